# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own layer
#
# A layer that is composed of known layers needs nothing. Weights of your own that stand bare in a
# module need nothing either: margeq then finds their gradients datum by datum, which is exact, but
# slow. A new *type* of layer that should be fast takes three things: one file, one rule, one test.
#
# The layer of this page is a circulant map. It weighs a signal with the same weights from every
# position:
#
#     y[n,t] = sum_i weight[i] x[n, (t + i) mod size] + bias

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import margeq
from margeq import layers
from margeq.curvature import LinearIO, register_kfac_rule
from margeq.errors import MargeqError
from margeq.testing import LayerCase, check_layer

torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores

# %% [markdown]
# ## The layer
#
# An ordinary module. `induced_weight` is optional: the layer as a matrix, for tests and reports.


# %%
class Circulant(nn.Module):
    """One weight vector, moved around a circle."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(1))

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """What output t sees, ``x[n, (t + i) mod size]`` as ``[n, t, i]``."""
        return torch.cat([x, x[:, :-1]], 1).unfold(1, len(self.weight), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.windows(x) @ self.weight + self.bias

    def induced_weight(self) -> torch.Tensor:
        """The matrix, ``[outputs, inputs]``."""
        return torch.stack([self.weight.roll(t) for t in range(len(self.weight))])


# %% [markdown]
# ## The rule
#
# A rule says how the layer is a linear map of its weight:
#
#     y[n,t,b,o] = sum_i theta[o,b,i] * inputs[n,t,b,i]
#
# `n` is the datum, `t` a position at which the same weight is used again, `b` an independent block,
# `o` and `i` outputs and inputs of a block. Here every output is a position, and there is one block
# with one output. The rule gets the input and the gradients with respect to the output, `[v, n, t]`
# with one row `v` per column of the output's Hessian. It returns a `LinearIO` per parameter.


# %%
@register_kfac_rule(Circulant)
def rule(layer: Circulant, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, LinearIO]:
    inputs = layer.windows(x)[:, :, None, :]  # [n, t, 1, i]: one block
    grads = grad_y[:, :, :, None, None]  # [v, n, t, 1, 1]: one block, one output
    ones = torch.ones_like(inputs[..., :1])  # a bias is a weight with inputs of one
    return {"weight": LinearIO(inputs, grads), "bias": LinearIO(ones, grads, is_bias=True)}


# %% [markdown]
# ## The test
#
# `check_layer` holds the rule against autograd and against dense matrices, in double precision.
# `shared` names the weights that one datum uses at several positions: there a Kronecker curvature
# is an approximation, everywhere else it has to be exact.

# %%
case = LayerCase("circulant", lambda: Circulant(5), (3, 5), shared=("weight",))
check_layer(case)
print("the contracts hold")

# %% [markdown]
# In a project this is a test of three lines:
#
# ```python
# def test_circulant():
#     check_layer(Circulant(5), torch.zeros(3, 5), shared=("weight",))
# ```
#
# ## A test that can fail
#
# Now three mistakes that are easy to make. Each is a subclass with a wrong rule, or with a
# statement about itself that is not true.


# %%
class WrongWay(Circulant):
    """Its rule turns the circle the wrong way."""


@register_kfac_rule(WrongWay)
def wrong_way(layer: WrongWay, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, LinearIO]:
    return rule(layer, x.flip(1), grad_y)


class ForgottenBias(Circulant):
    """Its rule leaves the bias out."""


@register_kfac_rule(ForgottenBias)
def forgotten(layer: ForgottenBias, x: torch.Tensor, grad_y: torch.Tensor) -> dict[str, LinearIO]:
    return {"weight": rule(layer, x, grad_y)["weight"]}


wrong = {
    "the wrong way round": (WrongWay, ("weight",)),
    "a forgotten bias": (ForgottenBias, ("weight",)),
    "sharing that is not declared": (Circulant, ()),
}
for mistake, (kind, shared) in wrong.items():
    try:
        check_layer(kind(5), torch.zeros(3, 5), shared=shared)
    except MargeqError as error:
        print(f"{mistake}:\n  {error}\n")

# %% [markdown]
# ## At work, as a candidate path
#
# A layer with a rule can be a candidate path like any other. Here are two questions about noisy
# signals of 16 values on a circle. *How fast?* (two or three waves) is the same wherever the signal
# begins. *Where?* asks in which half of the circle a single bump lies.

# %%
SIZE, N = 16, 600
angle = 2 * torch.pi * torch.arange(SIZE) / SIZE


def waves(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two or three waves, begun anywhere; the label says which."""
    labels = torch.randint(2, (N,), generator=generator)
    phase = 2 * torch.pi * torch.rand(N, 1, generator=generator)
    return torch.cos((2 + labels[:, None]) * angle + phase), labels


def bumps(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A bump anywhere; the label is its half of the circle."""
    places = torch.randint(SIZE, (N,), generator=generator)
    distance = (angle[None] - angle[places][:, None]).cos()
    return (4 * (distance - 1)).exp(), (places >= SIZE // 2).long()


questions = {}
for name, make in {"how fast?": waves, "where?": bumps}.items():
    generator = torch.Generator().manual_seed(0)
    signals, labels = make(generator)
    questions[name] = (signals + 0.3 * torch.randn(signals.shape, generator=generator), labels)

figure, axes = plt.subplots(1, 2, figsize=(6.4, 2), sharey=True, layout="constrained")
for axis, (name, (signals, labels)) in zip(axes, questions.items(), strict=True):
    for label, style in ((0, "-"), (1, "--")):
        axis.plot(signals[labels == label][0], style, color="black", lw=1.2, label=f"label {label}")
    axis.set(title=name, xlabel="position")
    axis.spines[["top", "right"]].set_visible(False)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
plt.show()


# %%
class Channels(nn.Module):
    """Several circulant maps side by side, [n, size] -> [n, channels, size]."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(Circulant(size) for _ in range(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([one(x) for one in self.maps], 1)


def network(channels: int = 4) -> nn.Sequential:
    """Circulant or free, then a read-out that adds up all positions."""
    paths = {
        "circulant": Channels(SIZE, channels),
        "free": nn.Sequential(nn.Linear(SIZE, channels * SIZE), nn.Unflatten(1, (channels, SIZE))),
    }
    return nn.Sequential(
        layers.ResidualPathways(paths, "sum"), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(channels, 2),
    )  # fmt: skip


results = {}
for name, (signals, labels) in questions.items():
    batches = list(zip(signals.split(60), labels.split(60), strict=True))
    results[name] = margeq.optimize_marglik(
        network(), batches, n_epochs=60, n_epochs_burnin=10, marglik_frequency=5,
        optimizer_kwargs={"lr": 0.02}, progress="none", seed=0,
    )  # fmt: skip
    print(name)
    for row in results[name].effective_dimension().paths:
        if row.path:
            print(f"  {row.path:<10} {row.parameters:>6,} weights, {row.effective:5.1f} effective, "
                  f"{row.function_share:4.0%} of the function, {row.verdict}")  # fmt: skip
    starts = {r.start: round(r.log_marginal_likelihood / N, 3) for r in results[name].restarts}
    print(f"  log evidence per datum: {starts}")
    print(f"  {results[name].message}")

# %% [markdown]
# What the kept paths look like, as matrices: one of the four channels, the one with the largest
# weights. A circulant matrix is one row, moved along.

# %%
circulant = [m.induced_weight() for m in results["how fast?"].model[0].paths["circulant"].maps]
free = results["where?"].model[0].paths["free"][0].weight.unflatten(0, (-1, SIZE))
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), layout="constrained")
for axis, name, maps in (
    (axes[0], "how fast? circulant", torch.stack(circulant)),
    (axes[1], "where? free", free),
):
    largest = maps[maps.square().sum((1, 2)).argmax()].detach()
    bound = largest.abs().max().item()
    axis.imshow(largest, cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set(title=name, xlabel="input", ylabel="output")
plt.show()

# %% [markdown]
# The free matrix has one sign for either half of the circle, the same for nearly all outputs.
#
# For *how fast?* the circulant path is kept: the free one, with sixteen times the weights, is off.
# For *where?* it is the other way round, and circulant maps alone are a guess: ln(1/2) = -0.693.
#
# What else a rule can say (blocks of channels, other layouts, hyperparameters inside a layer) is in
# CONTRIBUTING, with the list of all contracts. The rules in `margeq/layers` are written in the same
# way.
