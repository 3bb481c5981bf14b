# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From a network that you have, to one that you ship
#
# `margeq.relax` puts candidate paths around the layers of a network that was not written for
# margeq. The copy computes what the network computes. After training by the evidence,
# `margeq.harden` makes a plain network of torch from it again, with the paths that the data chose.
#
# This page needs torchvision, and about half a minute of one core.

# %%
import importlib.util
import io
import warnings

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from margeq.convert import cost_table, relaxation
from margeq.data import place_digits

# as `import torchvision`, and also beside a CPU build of torch that its operators are not for
from margeq.integrations.neighbours import import_torchvision

torchvision = import_torchvision()
torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores

# %% [markdown]
# ## What relaxing a ResNet-18 costs
#
# A ResNet-18 with the stem for small pictures, as used for CIFAR. Next to each convolution stands a
# new path: `factored`, a map with weights of its own for every place, as a product of two factors.

# %%
resnet18 = torchvision.models.resnet18(num_classes=10)
resnet18.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
resnet18.maxpool = nn.Identity()
small_pictures = torch.zeros(1, 3, 16, 16)
relaxed18 = margeq.relax(resnet18, small_pictures, paths=("factored", "conv"))

lines = str(relaxation(relaxed18)).splitlines()
print("\n".join([*lines[:3], "...", lines[-1]]))
print()
print(cost_table({"ResNet-18": resnet18, "relaxed": relaxed18}, small_pictures, repeats=3))

# %% [markdown]
# Latencies on this page are those of one machine at one moment. They differ from run to run.
#
# We stop here with the ResNet-18. Its evidence needs the eigenvalues of a matrix of 4,608 rows for
# each of the last convolutions, and that is work for a GPU. The rest of the page trains a narrow
# network of the same blocks, from the same library.
#
# ## A network that you have
#
# Two residual blocks of torchvision, 8 and 16 channels wide, trained as usual on digits that lie
# anywhere on a canvas of 12 × 12 pixels.

# %%
task = place_digits("digit", canvas=12, copies=1).standardised()
loader = task.train_loader(64)
Block = torchvision.models.resnet.BasicBlock

torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
    Block(8, 8),
    Block(8, 16, stride=2, downsample=nn.Sequential(
        nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16),
    )),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip

optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(8):
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()


def held_out(model: nn.Module) -> str:
    """Share of right answers on the 360 digits that nothing is trained on."""
    with torch.no_grad():
        right = model.eval()(task.test_images).argmax(1) == task.test_labels
    return f"{right.float().mean():.1%} of {len(right)} held-out digits"


print(held_out(network))

# %% [markdown]
# ## Relaxing
#
# The new paths begin as the zero function, so the copy says what the network said, to the bit.

# %%
pictures = task.train_images[:8]
relaxed = margeq.relax(network, pictures, paths=("factored", "conv"))
print(relaxation(relaxed))
with torch.no_grad():
    difference = (relaxed.eval()(pictures) - network.eval()(pictures)).abs().max().item()
print(f"\nlargest difference of the outputs: {difference}")

# %% [markdown]
# ## Training by the evidence
#
# `restarts=["current"]` goes on from the trained weights. (Other starts would draw all weights
# anew.)

# %%
n_epochs = 16
result = margeq.optimize_marglik(
    relaxed.train(), loader, marglik_loader=task.marglik_loader(512), restarts=["current"],
    n_epochs=n_epochs, n_epochs_burnin=4, marglik_frequency=2, optimizer_kwargs={"lr": 0.003},
    scheduler_cls=CosineAnnealingLR, scheduler_kwargs={"T_max": n_epochs * len(loader)},
    progress="none", seed=0,
)  # fmt: skip
print(f"{'layer':<15} {'path':<9} {'weights':>8} {'effective':>9} {'function':>8}  verdict")
for row in result.effective_dimension().paths:
    if row.path:
        print(f"{row.layer:<15} {row.path:<9} {row.parameters:>8,} {row.effective:>9.1f} "
              f"{row.function_share:>8.0%}  {row.verdict}")  # fmt: skip
print(f"\n{result.message}")

# %%
history = result.history
figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
for key, dash, label in (
    ("log_likelihood", "--", "fit"),
    ("occam", ":", "Occam term"),
    ("log_marginal_likelihood", "-", "sum: log evidence"),
):
    values = [getattr(update, key) / result.n_data for update in history.updates]
    epochs = [update.epoch for update in history.updates]
    axis.plot(epochs, values, dash, color="black", marker=".", label=label)
axis.set(xlabel="epoch", ylabel="per datum [nats]", title="training of the relaxed network")
axis.legend(frameon=False, fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
for switch in history.switches:
    print(f"epoch {switch['epoch']:>2}: {switch['layer']} {switch['path']} is {switch['to']}")

# %% [markdown]
# Every layer keeps its convolution, and every factored path is switched off. So for this question
# the architecture was right, and the evidence said so without held-out data. A single start was
# asked, so this holds for networks near the one that we had.
#
# The fit dips once, two epochs after the paths were switched off. The state with the highest
# evidence is kept, so a dip on the way does no harm.
#
# ## Hardening
#
# `harden` drops what is off. With `example_input` it also checks that the outputs stay the same.

# %%
plain = margeq.harden(relaxed.eval(), result, example_input=pictures)
kinds = sorted({type(module).__module__.split(".")[0] for module in plain.modules()})
print(f"modules of: {', '.join(kinds)}")
print(f"before  {held_out(network)}\nrelaxed {held_out(relaxed)}\nafter   {held_out(plain)}")
print()
print(cost_table({"before": network, "relaxed": relaxed, "after": plain}, pictures))

# %% [markdown]
# The relaxed network still has the weights of all paths, but those that are off are not computed.
# The hardened network has the layers of the first one. That it is better comes from its training,
# which was longer and with learned priors.
#
# ## Shipping
#
# Nothing of margeq is left in it, so `torch.export` takes it as it is.

# %%
plain.eval()
program = torch.export.export(plain, (pictures,))
file = io.BytesIO()
torch.export.save(program, file)
again = torch.export.load(io.BytesIO(file.getvalue())).module()
with torch.no_grad():
    difference = (again(pictures) - plain(pictures)).abs().max().item()
print(f"torch.export: {len(file.getvalue()) / 1024:.0f} KB, largest difference {difference}")

# %% [markdown]
# To ONNX, where its packages are installed:

# %%
if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
    import onnxruntime

    with warnings.catch_warnings():
        # the exporter itself uses names that torch has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        onnx = torch.onnx.export(plain, (pictures,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    (outputs,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(outputs) - plain(pictures)).abs().max().item()
    print(f"ONNX: largest difference below 1e-5: {difference < 1e-5}")
else:
    print("onnx, onnxscript or onnxruntime is not installed: left out")
