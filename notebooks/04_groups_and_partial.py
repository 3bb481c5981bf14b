# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Groups, and how much of one
#
# A convolution commutes with shifts. A group convolution commutes with rotations too, perhaps with
# reflections. Is that right for your data, in every layer? Again this is a question for the
# evidence. It can be asked in two ways:
#
# - *nested candidates*: a path for the group, and one for a smaller group, side by side;
# - *gates*: one layer that keeps all of a group, part of it, or nothing but the identity.
#
# This page needs about a minute and a half of one core.

# %%
import matplotlib.pyplot as plt
import torch
from IPython.display import display
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from margeq import groups, layers, testing
from margeq.data import ImageTask, place_digits
from margeq.report.palette import path_colours
from margeq.report.polar import subset_figure

torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores
P4, Z2 = groups.P4, groups.Z2

# %% [markdown]
# ## Groups
#
# `P4` has the four quarter turns, `P4M` also the mirrors, `Z2` shifts alone. `C(n)` and `D(n)` have
# n rotations. Feature maps on a group are `[data, channels, elements, rows, columns]`. The smaller
# the group a layer commutes with, the more weights it has:

# %%
for name, subgroup in {"P4M": groups.P4M, "P4": P4, "Z2": Z2}.items():
    layer = layers.SubgroupConv2d(4, 4, 3, group=groups.P4M, subgroup=subgroup, bias=False)
    print(f"{name:<4} {layer.conv.weight.numel():>6,} weights between the same maps of P4M")

# %% [markdown]
# ## Does a network commute with a group?
#
# `testing.equivariance_error` turns the input, runs the network, and compares. Here are two random
# networks, one on P4 and one of ordinary convolutions, on digits.

# %%
pictures = place_digits("digit", canvas=12, copies=1).train_images[:16]
torch.manual_seed(0)
turning = nn.Sequential(
    layers.LiftingConv2d(1, 4, 3, group=P4, padding=1), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
    layers.GroupConv2d(4, 4, 3, group=P4, padding=1), layers.GroupPool(P4),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
ordinary = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
)  # fmt: skip
for name, model in {"on P4": turning, "ordinary": ordinary}.items():
    error = testing.equivariance_error(model, P4, pictures).exact
    turns = "  ".join(f"{90 * u:>3}°: {value:.0e}" for u, value in error.per_element.items())
    print(f"{name:<9} {turns}")

# %% [markdown]
# The network on P4 is exact up to rounding. It is easy to lose that without noticing: on maps of 11
# pixels, halving leaves a row and a column over on one side. `layers.check_sizes` finds it without
# running anything, and says what to do.

# %%
for size in (12, 11):
    faults = layers.check_sizes(turning, (1, size, size), P4)
    error = testing.equivariance_error(turning, P4, pictures[..., :size, :size]).exact.max
    print(f"{size} pixels: error {error:.0e}; {faults[0] if faults else 'no fault'}\n")

# %% [markdown]
# ## Two questions about turned digits
#
# Each digit, 8 × 8 pixels, is turned by a random number of quarters. *Which digit?* does not depend
# on the turn. *How was it turned?* is about nothing else.

# %%
upright = place_digits("digit", canvas=8, copies=1).standardised()
generator = torch.Generator().manual_seed(0)


def turned(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each picture turned by 0 to 3 quarters, and by how many."""
    quarters = torch.randint(4, (len(images),), generator=generator)
    poses = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)], 1)
    return poses[torch.arange(len(images)), quarters], quarters


train_images, train_turns = turned(upright.train_images)
test_images, test_turns = turned(upright.test_images)
tasks = {
    "which digit?": ImageTask(
        train_images, upright.train_labels, test_images, upright.test_labels, "digit"
    ),
    "how turned?": ImageTask(train_images, train_turns, test_images, test_turns, "turn"),
}

figure, axes = plt.subplots(1, 8, figsize=(7, 1.3), layout="constrained")
for axis, picture, digit, turn in zip(
    axes, train_images, upright.train_labels, train_turns, strict=False
):
    axis.imshow(picture[0], cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.set_title(f"{digit}, {90 * turn}°", fontsize=9)
plt.show()


# %%
def train(model: nn.Module, task: ImageTask, n_epochs: int, **options: object) -> object:
    """One call, and the share of right answers on held-out digits."""
    loader = task.train_loader(64)
    result = margeq.optimize_marglik(
        model, loader, marglik_loader=task.marglik_loader(512), n_epochs=n_epochs,
        n_epochs_burnin=6, optimizer_kwargs={"lr": 0.01}, scheduler_cls=CosineAnnealingLR,
        scheduler_kwargs={"T_max": n_epochs * len(loader)}, progress="none", seed=0, **options,
    )  # fmt: skip
    with torch.no_grad():
        right = (model.eval()(task.test_images).argmax(1) == task.test_labels).float().mean()
    starts = {r.start: round(r.log_marginal_likelihood / result.n_data, 3) for r in result.restarts}
    print(f"log evidence per datum: {starts}")
    print(f"{result.message}; held-out digits {right:.1%}")
    return result


# %% [markdown]
# ## Nested candidates
#
# The second layer is the sum of two paths: one commutes with P4, the other with shifts alone. The
# second contains the first. The read-out takes the largest value over all elements and places, so a
# network with P4 alone cannot tell turns apart.


# %%
def nested(n_classes: int) -> nn.Sequential:
    """A layer on P4, then a choice between P4 and Z2, then a read-out blind to turns."""
    paths = {
        name: layers.SubgroupConv2d(8, 12, 3, group=P4, subgroup=subgroup, padding=1)
        for name, subgroup in {"p4": P4, "z2": Z2}.items()
    }
    return nn.Sequential(
        layers.LiftingConv2d(1, 8, 3, group=P4, padding=1), nn.BatchNorm3d(8), nn.ReLU(),
        nn.MaxPool3d((1, 2, 2)), layers.ResidualPathways(paths, "sum"), nn.ReLU(),
        layers.GroupPool(P4), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(12, n_classes),
    )  # fmt: skip


chosen = {}
for question, task in tasks.items():
    print(f"{question}")
    chosen[question] = train(
        nested(task.n_classes), task, n_epochs=16, marglik_frequency=2,
        restarts=["symmetric", "only:p4", "only:z2"],
    )  # fmt: skip
    for row in chosen[question].effective_dimension().paths:
        if row.path:
            print(f"  {row.path}: {row.parameters:>6,} weights, {row.effective:5.1f} effective, "
                  f"{row.function_share:4.0%} of the function, {row.verdict}")  # fmt: skip
    print()

# %%
colours = path_colours(["p4", "z2"])
figure, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharex=True, layout="constrained")
for axis, (question, result) in zip(axes, chosen.items(), strict=True):
    for restart in result.restarts:
        epochs = [update.epoch for update in restart.history.updates]
        values = [
            update.log_marginal_likelihood / result.n_data for update in restart.history.updates
        ]
        colour = colours.get(restart.start.removeprefix("only:"), "black")
        label = restart.start + " (kept)" * restart.kept
        axis.plot(epochs, values, ".-", color=colour, lw=2.4 if restart.kept else 1.2, label=label)
    axis.set(xlabel="epoch", title=question)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("log evidence per datum [nats]")
plt.show()

# %% [markdown]
# For the digit, P4 is selected and the path of shifts is off, with four times the weights. For the
# turn it is the other way round, and P4 alone is no better than a guess among four: ln(1/4) =
# -1.386.
#
# ## Gates
#
# A `GroupGate` weighs the elements of a map. At width 1 nothing changes and the layer keeps the
# whole group. At width 1/4, of P4, the identity alone is left. Between them it keeps rotations up
# to an angle. The evidence moves the width, the training loss does not see it.

# %%
gate = layers.GroupGate(P4, width=0.5)
print(gate.weights().detach().tolist(), "->", gate.learned_subset())


# %%
def gated(n_classes: int) -> nn.Sequential:
    """Two layers on P4, each behind it a gate, and the same read-out."""
    return nn.Sequential(
        layers.LiftingConv2d(1, 4, 3, group=P4, padding=1), nn.BatchNorm3d(4), nn.ReLU(),
        layers.GroupGate(P4), nn.MaxPool3d((1, 2, 2)),
        layers.GroupConv2d(4, 8, 3, group=P4, padding=1), nn.BatchNorm3d(8), nn.ReLU(),
        layers.GroupGate(P4),
        layers.GroupPool(P4), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, n_classes),
    )  # fmt: skip


subsets = {}
for question, task in tasks.items():
    print(question)
    result = train(gated(task.n_classes), task, n_epochs=16, marglik_frequency=2, lr_hyp=0.2)
    names = dict(zip(result.learned_subsets, ("first layer", "second layer"), strict=True))
    for name, subset in result.learned_subsets.items():
        print(f"  {names[name]}: {subset}")
        subsets[f"{question[:-1]}: {names[name]}"] = subset
    print()

# %% [markdown]
# `restarts="auto"` starts the gates where they are (`current`), at the whole group, and at the
# identity, as either end can be a trap. It keeps the best by evidence.
#
# The figure draws what each gate leaves, around a circle. The identity is at the top. A bar that
# fills its ring has weight 1.

# %%
display(subset_figure(subsets))

# %% [markdown]
# For the digit both layers keep all rotations, or nearly all. For the turn both give part of them
# up. Neither goes down to the identity: a network that weighs rotations unequally can already tell
# them apart, and it still shares its filters between them.
