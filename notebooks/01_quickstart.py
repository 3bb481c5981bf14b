# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which symmetry does each layer choose?
#
# A convolution is a linear layer that promises not to care about place. Often that is right.
# Sometimes it is wrong. margeq lets a layer have both, as a sum of *candidate paths*, and asks the
# training data which of them it needs. No validation set takes part.
#
# This page asks one small network two questions about the same pictures:
#
# - *Which digit?*, with the digit anywhere on the canvas. The place does not matter.
# - *Which corner?* Nothing but the place matters.
#
# It takes about a minute of one CPU core. The digits come with the package.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from margeq import layers
from margeq.data import place_digits
from margeq.report.palette import path_colours

torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores

# %% [markdown]
# ## The data
#
# 1,437 handwritten digits of 8 × 8 pixels, on a canvas of 12 × 12. A fifth of all digits, 360, is
# set aside; we look at them once, at the end.

# %%
tasks = {question: place_digits(question, canvas=12, copies=1) for question in ("digit", "corner")}

figure, axes = plt.subplots(2, 6, figsize=(7, 2.8), layout="constrained")
for row, (question, task) in zip(axes, tasks.items(), strict=True):
    for axis, picture, label in zip(row, task.train_images, task.train_labels, strict=False):
        axis.imshow(picture[0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        axis.set_title(task.class_names[label], fontsize=9)
    row[0].set_ylabel(f"which {question}?")
plt.show()

# %% [markdown]
# ## The network
#
# Two layers. Each is the sum of a convolution (`conv`) and of a map in which every place has
# weights of its own (`fc`, in factored form). The read-out takes the mean over all places. So a
# network of convolutions alone cannot say where anything is.


# %%
def network(n_classes: int) -> nn.Sequential:
    """Two sums of candidate paths, each halving the map, and a read-out blind to place."""

    def layer(channels_in: int, channels_out: int, size: int) -> layers.ResidualPathways:
        half = size // 2
        paths = {
            "conv": nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 3, padding=1, padding_mode="circular"),
                layers.PolyphaseSubsample(),  # a stride of 2 that does not care about place
            ),
            "fc": layers.FactoredLinear2d(channels_in, channels_out, (size, size), (half, half)),
        }
        return layers.ResidualPathways(paths, reduction="sum")

    return nn.Sequential(
        layer(1, 8, 12), nn.ReLU(), layer(8, 16, 6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, n_classes),
    )  # fmt: skip


def train(question: str, n_epochs: int = 30) -> margeq.MargLikResult:
    """One call, on the training digits only."""
    task = tasks[question].standardised()
    loader = task.train_loader(64)
    return margeq.optimize_marglik(
        network(task.n_classes), loader,
        marglik_loader=task.marglik_loader(512),  # the same data in larger batches, for speed
        n_epochs=n_epochs, n_epochs_burnin=9, marglik_frequency=3,
        optimizer_kwargs={"lr": 0.01},
        scheduler_cls=CosineAnnealingLR, scheduler_kwargs={"T_max": n_epochs * len(loader)},
        progress="none", seed=0,
    )  # fmt: skip


# %% [markdown]
# ## Which digit?

# %%
digit = train("digit")
print(digit.effective_dimension())

# %% [markdown]
# How to read the table:
#
# - *parameters*: how many weights the path has.
# - *prior prec.*: the learned precision of the prior on them. Large means: kept near zero.
# - *effective*: how many of the weights the data determined. It lies between 0 and *parameters*.
# - *function*: the path's share of the variance of the layer's output, over the training data. The
#   verdict goes by it: *off* below 1 %, *selected* from 90 % with all others off, else *mixed*.
#
# Both layers chose the convolution. The `fc` paths have most of the weights of these layers,
# and none of them is in use.

# %%
conv_weights, fc_weights = (
    sum(row.parameters for row in digit.effective_dimension().paths if row.path == path)
    for path in ("conv", "fc")
)
print(f"fc holds {fc_weights / (conv_weights + fc_weights):.0%} of the weights of both layers")
print(digit.selected)

# %% [markdown]
# ## Why believe it?
#
# The evidence of a network, its log marginal likelihood, is the fit to the data minus a price for
# the weights that were needed. A start can end in a poor optimum. So `restarts="auto"`, the
# default, trains from several starts and keeps the run with the highest evidence:
#
# - *symmetric*: both paths, and `fc` begins near zero;
# - *free*: both paths begin alike;
# - *only:conv* and *only:fc*: one path alone.


# %%
def starts(result: margeq.MargLikResult, title: str) -> None:
    """The evidence of every start, over the epochs."""
    _, axis = plt.subplots(figsize=(6.4, 3), layout="constrained")
    for restart, dash in zip(result.restarts, ("-", "--", ":", "-."), strict=False):
        epochs = [update.epoch for update in restart.history.updates]
        values = [
            update.log_marginal_likelihood / result.n_data for update in restart.history.updates
        ]
        colour = path_colours(["conv", "fc"]).get(restart.start.removeprefix("only:"), "black")
        label = restart.start + " (kept)" * restart.kept
        axis.plot(epochs, values, dash, color=colour, lw=2.4 if restart.kept else 1.3, label=label)
    axis.set(xlabel="epoch", ylabel="log evidence per datum [nats]", title=title)
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    plt.show()


starts(digit, "Which digit?")
for restart in digit.restarts:
    print(f"{restart.start:<10} {restart.log_marginal_likelihood / digit.n_data:7.3f} per datum")
print(f"\n{digit.message}; {digit.diagnostics.clamped_eigenvalues} eigenvalues set to zero")

# %% [markdown]
# Convolutions alone end a little below the symmetric start, whose `fc` paths are off in the end.
# The free start, and `fc` alone, end far below both.
#
# ## Which corner?
#
# The same network, the same digits, the same settings, another question.

# %%
corner = train("corner", n_epochs=30)
print(corner.effective_dimension())
starts(corner, "Which corner?")
for restart in corner.restarts:
    print(f"{restart.start:<10} {restart.log_marginal_likelihood / corner.n_data:7.3f} per datum")

# %% [markdown]
# Now `fc` carries both layers. Convolutions alone cannot answer: their evidence per datum is that
# of a guess among four corners, ln(1/4) = -1.386.
#
# The two best starts are very close, and one of them has `fc` alone while the other has both
# paths. So the evidence does not decide here whether a convolution helps besides. It does decide
# that `fc` is needed. How close is close?

# %%
best, second, *_ = sorted(corner.restarts, key=lambda r: -r.log_marginal_likelihood)
ahead = best.log_marginal_likelihood - second.log_marginal_likelihood
print(f"{best.start} is {ahead:.1f} nats ahead of {second.start}, whose shares are:")
for layer, shares in second.history.updates[-1].function_share.items():
    print(f"  layer {layer}: " + ", ".join(f"{path} {share:.0%}" for path, share in shares.items()))

# %% [markdown]
# A difference of d nats means that the data are exp(d) times as probable. Less than 3 nats, about
# 20 : 1, decide little.

# %%
figure, axes = plt.subplots(1, 2, figsize=(7, 2), sharey=True, layout="constrained")
colours = path_colours(["conv", "fc"])
for axis, (question, result) in zip(axes, {"digit": digit, "corner": corner}.items(), strict=True):
    rows = [row for row in result.effective_dimension().paths if row.path]
    names = list(dict.fromkeys(row.layer for row in rows))
    left = dict.fromkeys(names, 0.0)
    for row in rows:
        label = row.path if row.layer == names[0] else None
        height = names.index(row.layer)
        axis.barh(height, row.function_share, left=left[row.layer], color=colours[row.path],
                  label=label)  # fmt: skip
        left[row.layer] += row.function_share
    axis.set_yticks(range(len(names)), [f"layer {name}" for name in names])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set(title=f"which {question}?", xlabel="share of the function's variance")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].invert_yaxis()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# ## The check
#
# Nothing above has seen the 360 digits that were set aside. Now they are looked at.

# %%
for question, result in {"digit": digit, "corner": corner}.items():
    task = tasks[question].standardised()
    with torch.no_grad():
        right = result.model.eval()(task.test_images).argmax(1) == task.test_labels
    print(f"which {question}?  {right.float().mean():.1%} of {len(right)} held-out digits")

# %% [markdown]
# The network is tiny: it is right about the digit in four cases of five.
#
# The next page, *reading a report*, looks at the same numbers more closely.

# %%
# what this page claims
verdicts = {(row.layer, row.path): row.verdict for row in digit.effective_dimension().paths}
assert verdicts["0", "conv"] == verdicts["2", "conv"] == "selected"
assert all(corner.effective_dimension().of(layer, "fc").verdict != "off" for layer in "02")
per_start = {r.start: r.log_marginal_likelihood / corner.n_data for r in corner.restarts}
assert abs(per_start["only:conv"] + 1.386) < 0.01
assert digit.success
assert corner.success
