# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Regression: noise, precisions, and how sure
#
# For real-valued targets margeq learns the standard deviation of the noise as well, from the same
# evidence as the prior precisions. The result then knows how sure it is of its predictions.
#
# All data on this page are made here: a sine, noise of standard deviation 0.2, and a gap in the
# middle where there are no data.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import margeq
from margeq.posterior import Posterior
from margeq.report.palette import path_colours

torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores
torch.set_default_dtype(torch.float64)  # the network is tiny: double precision costs nothing

TRUE_NOISE = 0.2
BLUE, ORANGE = path_colours(["conv", "fc"]).values()


def curve(x: torch.Tensor) -> torch.Tensor:
    """What the data are about."""
    return torch.sin(3 * x)


def data(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` in [-2, -0.4] and [0.4, 2], and noisy values of the curve."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 1.6 + 0.4
    x *= torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    return x, curve(x) + TRUE_NOISE * torch.randn(n, 1, generator=generator)


def network(n_outputs: int = 1) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, n_outputs))


# %% [markdown]
# ## Learning the noise
#
# A list of batches is a loader. Here all data are one batch. Targets have the shape of the outputs,
# `[n, 1]`.

# %%
x, y = data(200, seed=3)
loader = [(x, y)]


def train(sigma_noise_init: float) -> margeq.MargLikResult:
    """The same network, from another first guess of the noise."""
    return margeq.optimize_marglik(
        network(), loader, likelihood="regression", sigma_noise_init=sigma_noise_init,
        n_epochs=1200, n_epochs_burnin=100, marglik_frequency=20,
        optimizer_kwargs={"lr": 0.02}, progress="none", seed=0,
    )  # fmt: skip


result = train(sigma_noise_init=0.3)
print(f"learned noise {result.likelihood.sigma_noise.item():.3f}, true noise {TRUE_NOISE}")
print(result.message)
print(result.effective_dimension())

# %% [markdown]
# The noise comes out within a tenth of the true one. There are no candidate paths here, so the
# table has no verdicts. It still says how many of the weights the data determined.
#
# ## The first guess matters
#
# `sigma_noise_init` is 1 by default, in units of the targets. These targets lie between -1.5 and
# 1.5, so a noise of 1 explains nearly all of them. From there the network can end as a straight
# line with much noise. That is a poor optimum, and the evidence says so.

# %%
from_one = train(sigma_noise_init=1.0)
print(margeq.compare({"from 0.3": result, "from 1.0": from_one}))
print()
for name, found in {"from 0.3": result, "from 1.0": from_one}.items():
    print(f"{name}: learned noise {found.likelihood.sigma_noise.item():.3f}")

# %% [markdown]
# Start with noise that is small for your targets, or try two starts and keep the better evidence.
#
# ## Uncertainty bands
#
# `to_laplace` hands the posterior over to laplace-torch. Its predictive variance is that of the
# function. Noise comes on top.

# %%
posterior = result.to_laplace(loader)
grid = torch.linspace(-3, 3, 301)[:, None]
mean, variance = posterior(grid)
mean, function_sd = mean[:, 0].detach(), variance[:, 0, 0].detach().sqrt()
total_sd = (function_sd**2 + result.likelihood.sigma_noise.item() ** 2).sqrt()

figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
axis.plot(x, y, ".", color="#8a8a8a", ms=4, label="data")
axis.plot(grid, curve(grid), "--", color="black", lw=1, label="truth")
axis.plot(grid, mean, color=BLUE, label="mean")
for sd, alpha, label in ((total_sd, 0.15, "±2 sd with noise"), (function_sd, 0.35, "±2 sd")):
    axis.fill_between(grid[:, 0], mean - 2 * sd, mean + 2 * sd, color=BLUE, alpha=alpha, lw=0,
                      label=label)  # fmt: skip
axis.set(xlabel="x", ylabel="y", ylim=(-3, 3))
axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

where = {"among data, x = 1.2": 1.2, "in the gap, x = 0": 0.0, "outside, x = 3": 3.0}
for name, place in where.items():
    index = int((grid[:, 0] - place).abs().argmin())
    print(f"{name:<20} sd of the function {function_sd[index]:.3f}")

# %% [markdown]
# The band is narrow among the data, and wide in the gap and outside. Far outside do not lean on it:
# near x = 3 the truth leaves the inner band.
#
# Is the band with noise right? Of new data from the same places, about 95 % should lie in it.

# %%
new_x, new_y = data(2000, seed=1)
new_mean, new_variance = posterior(new_x)
new_sd = (new_variance[:, 0, 0] + result.likelihood.sigma_noise.item() ** 2).sqrt()
inside = ((new_y - new_mean)[:, 0].abs() < 1.96 * new_sd).double().mean().item()
print(f"{inside:.1%} of 2,000 new data lie within 1.96 sd")

# %% [markdown]
# `margeq.posterior.Posterior` gives the same variances without laplace-torch.

# %%
state = margeq.laplace.accumulate(result.model, loader, result.likelihood)
own = Posterior.of(state, result.prior, result.likelihood)
_, own_variance = own.functional_variance(result.model, grid)
difference = (own_variance[:, 0, 0].sqrt() - function_sd).abs().max().item()
print(f"largest difference of the standard deviations: {difference:.0e}")

# %% [markdown]
# ## Evidence against a grid
#
# The usual way to find a prior precision is a grid: train once per value, and look at data that
# were held out. Here is that grid, for illustration, on 60 data with one precision for all
# weights. `hyper_solver="fixed"` leaves precision and noise as they are. The held-out error is
# that of 2,000 data, which in practice nobody would leave out of training.

# %%
few = [data(60, seed=3)]
options = {
    "prior": "scalar", "n_epochs": 600, "optimizer_kwargs": {"lr": 0.02}, "progress": "none",
    "seed": 0,
}  # fmt: skip
learned = margeq.optimize_marglik(
    network(), few, likelihood="regression", sigma_noise_init=0.3, n_epochs_burnin=100,
    marglik_frequency=20, **options,
)  # fmt: skip
noise = learned.likelihood.sigma_noise.item()
learned_precision = learned.prior.prior_precision["all"].item()


def held_out_error(model: nn.Module) -> float:
    """Root mean square error on new data."""
    with torch.no_grad():
        return (model(new_x) - new_y).square().mean().sqrt().item()


precisions = [10 ** (step / 4) for step in range(-10, 7)]
evidence, errors = [], []
for precision in precisions:
    fixed = margeq.optimize_marglik(
        network(), few, likelihood=margeq.Gaussian(noise), prior_prec_init=precision,
        hyper_solver="fixed", n_epochs_burnin=400, marglik_frequency=100, **options,
    )  # fmt: skip
    evidence.append(fixed.log_marginal_likelihood)
    errors.append(held_out_error(fixed.model))

figure, axes = plt.subplots(2, 1, figsize=(6.4, 4), sharex=True, layout="constrained")
for axis, values, colour, name in (
    (axes[0], evidence, BLUE, "log evidence [nats]\n60 training data"),
    (axes[1], errors, ORANGE, "held-out error\n2,000 other data"),
):
    axis.semilogx(precisions, values, ".-", color=colour)
    axis.axvline(learned_precision, color="black", lw=1, ls="--")
    axis.set_ylabel(name)
    axis.spines[["top", "right"]].set_visible(False)
axes[1].set_xlabel("prior precision (dashed: learned, in one training)")
axes[1].set_ylim(0.2, 0.3)
plt.show()

best = min(errors)
print(f"grid: best evidence at precision {precisions[evidence.index(max(evidence))]:.2g}")
print(f"grid: smallest held-out error {best:.4f}, at {precisions[errors.index(best)]:.2g}")
print(
    f"learned precision {learned_precision:.2g}: held-out error {held_out_error(learned.model):.4f}"
)

# %% [markdown]
# One training without held-out data lands near the best evidence of the grid, somewhat below it,
# and its held-out error is 5 % above the smallest one of 17 trainings. The two criteria are not the
# same. Below 0.3 the error hardly changes, while the evidence still falls: it is about the whole
# distribution of the weights, of which the error sees the centre alone.
#
# ## Several outputs
#
# Here outputs share the noise, as their unit is the same. `likelihood="regression-per-output"`
# gives each its own. There are two, and the second is the first plus a trend.

# %%
generator = torch.Generator().manual_seed(5)
clean = torch.cat([curve(x), curve(x) + 0.5 * x], 1)
pairs = [(x, clean + TRUE_NOISE * torch.randn(clean.shape, generator=generator))]
both = margeq.optimize_marglik(
    network(2), pairs, likelihood="regression", sigma_noise_init=0.3, n_epochs=1200,
    n_epochs_burnin=100, marglik_frequency=20, optimizer_kwargs={"lr": 0.02}, progress="none",
    seed=0,
)  # fmt: skip
state = margeq.laplace.accumulate(both.model, pairs, both.likelihood)
mean, covariance = Posterior.of(state, both.prior, both.likelihood).functional_variance(
    both.model, grid
)
sds = covariance.diagonal(dim1=1, dim2=2).sqrt()
correlation = covariance[:, 0, 1] / (sds[:, 0] * sds[:, 1])

figure, axes = plt.subplots(
    2, 1, figsize=(6.4, 4), sharex=True, height_ratios=(2, 1), layout="constrained"
)
for output, colour in enumerate((BLUE, ORANGE)):
    centre, sd = mean[:, output], sds[:, output]
    axes[0].plot(x, pairs[0][1][:, output], ".", color=colour, ms=2, alpha=0.5)
    axes[0].plot(grid, centre, color=colour, label=f"output {output}")
    axes[0].fill_between(
        grid[:, 0], centre - 2 * sd, centre + 2 * sd, color=colour, alpha=0.3, lw=0
    )
axes[0].set(ylabel="mean ± 2 sd", ylim=(-3, 3))
axes[0].legend(frameon=False, fontsize=8)
axes[1].plot(grid, correlation, color="black")
axes[1].set(xlabel="x", ylabel="correlation", ylim=(-1, 1))
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
print(f"learned noise {both.likelihood.sigma_noise.item():.3f}, of both outputs")
print(f"correlation of the outputs from {correlation.min():.2f} to {correlation.max():.2f}")

# %% [markdown]
# The outputs share the hidden layer, so the posterior finds them correlated, more in some places
# than in others. `functional_variance` gives the covariance of the outputs per datum, `[n, 2, 2]`,
# and `functional_covariance` that of all data together.
