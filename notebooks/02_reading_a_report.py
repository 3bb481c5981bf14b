# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a report
#
# `optimize_marglik` returns a result. This page reads one from top to bottom: the table, the
# verdicts, whether to believe them, how they came about, what may be compared with what, and the
# HTML page that has it all.
#
# The subject is the question *which corner?* of the first page: digits in the corners of a canvas.

# %%
import tempfile
import warnings
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, display
from torch.optim.lr_scheduler import CosineAnnealingLR

import margeq
from margeq.data import place_digits
from margeq.errors import FlavourMismatchError
from margeq.models import digit_network
from margeq.report.palette import path_colours

torch.set_num_threads(1)  # sums in one order: the same figures with any number of cores
COLOURS = path_colours(["conv", "fc"])

task = place_digits("corner", canvas=12).standardised()
loader = task.train_loader(64)
evidence_loader = task.marglik_loader(512)


def train(paths: tuple[str, ...], **options: object) -> margeq.MargLikResult:
    """A small network with these candidate paths."""
    n_epochs = 30
    return margeq.optimize_marglik(
        digit_network(task.n_classes, paths=paths, widths=(4, 8), size=12), loader,
        marglik_loader=evidence_loader, n_epochs=n_epochs, n_epochs_burnin=6, marglik_frequency=3,
        optimizer_kwargs={"lr": 0.01}, scheduler_cls=CosineAnnealingLR,
        scheduler_kwargs={"T_max": n_epochs * len(loader)}, progress="none", seed=0, **options,
    )  # fmt: skip


# both paths from both starts; "auto", the default, would also train each path alone
result = train(("conv", "fc"), restarts=["symmetric", "free"])

# %% [markdown]
# ## The table
#
# `effective_dimension()` has a row per layer and path.

# %%
table = result.effective_dimension()
print(table)

# %% [markdown]
# - **effective**, γ, is the number of weights that the data determined: γ = Σ λ / (λ + δ) over the
#   eigenvalues λ of the curvature, with the prior precision δ. A weight that the data say nothing
#   about adds 0.
# - **eff./P** is γ per weight, without biases, and **relative** is a path's share of that in its
#   layer.
# - **function** is the path's share of the variance of the layer's output over the data.
#
# In the first layer `fc` has five times the effective parameters of `conv`, and only half of the
# function. The rows can be read one by one as well:

# %%
row = table.of("layer1", "fc")
print(row.effective, row.function_share, row.verdict)

# %% [markdown]
# ## The verdict goes by the function
#
# | verdict | |
# |---|---|
# | *off* | below 1 % of the variance of the layer's output |
# | *selected* | from 90 %, and all other paths off |
# | *mixed* | anything between: the layer needs more than one path, or has not decided |
#
# The two shares below are not the same. Effective parameters say how much was *learned* about a
# path, the function share says how much it *does*.

# %%
rows = [row for row in table.paths if row.path]
names = list(dict.fromkeys(row.layer for row in rows))
figure, axes = plt.subplots(1, 2, figsize=(7, 2), sharey=True, layout="constrained")
for axis, key, title in (
    (axes[0], "effective", "effective parameters"),
    (axes[1], "function_share", "share of the function"),
):
    left = dict.fromkeys(names, 0.0)
    for row in rows:
        value = getattr(row, key)
        label = row.path if row.layer == names[0] else None
        axis.barh(names.index(row.layer), value, left=left[row.layer], color=COLOURS[row.path],
                  label=label)  # fmt: skip
        left[row.layer] += value
    axis.set(title=title)
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_yticks(range(len(names)), names)
axes[0].invert_yaxis()
axes[1].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
plt.show()

# %% [markdown]
# ## Whether to believe it

# %%
diagnostics = result.diagnostics
print(result.success, "-", result.message)
print(f"slope at the end      {diagnostics.slope:.1e} nats per datum and epoch")
print(f"clamped eigenvalues   {diagnostics.clamped_eigenvalues}")
print(f"precisions at bounds  {diagnostics.at_bounds}")
print(f"captured trace        {diagnostics.captured_trace:.2%}")
print(f"failed restarts       {diagnostics.failed_restarts}")
print("\nlog evidence of every start:")
best = result.log_marginal_likelihood
for restart in sorted(result.restarts, key=lambda r: -r.log_marginal_likelihood):
    value = restart.log_marginal_likelihood
    print(f"  {restart.start:<10} {value:9.1f} nats, {value - best:9.1f} to the best")

# %% [markdown]
# - *slope*: has the evidence settled? Above 0.01 it has not, and the call warns.
# - *clamped eigenvalues*: numerical trouble; then try double precision.
# - *at bounds*: a precision at its bound belongs to a path that is off, to no other.
# - *captured trace*: the share of the output Hessian behind the evidence. Below 99 % the evidence
#   is too high.
# - *starts*: how far ahead is the best? A difference of d nats makes the data exp(d) times as
#   probable. Less than 3 nats decide little; here it is somewhat more.
#
# ## How it came about
#
# `result.history` has one entry per update of the hyperparameters. The log evidence is a sum: the
# *fit* of the data, and the *Occam term*, the price of what had to be learned, which is never
# positive. The state with the highest evidence is kept, and its precisions are brought to
# their optimum at the end.

# %%
updates = result.history.updates
epochs = [update.epoch for update in updates]
figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.8), layout="constrained")
for key, dash, label in (
    ("log_likelihood", "--", "fit"),
    ("occam", ":", "Occam term"),
    ("log_marginal_likelihood", "-", "sum: log evidence"),
):
    values = [getattr(update, key) / result.n_data for update in updates]
    axes[0].plot(epochs, values, dash, color="black", label=label)
axes[0].set(xlabel="epoch", ylabel="per datum [nats]", title="fit and Occam term")
for name in result.selected:
    for path, dash in (("conv", "-"), ("fc", "-")):
        shares = [update.function_share[name][path] for update in updates]
        marker = "o" if name == names[0] else "s"
        axes[1].plot(epochs, shares, dash, marker=marker, ms=4, color=COLOURS[path],
                     label=f"{name} {path}")  # fmt: skip
axes[1].set(xlabel="epoch", title="share of the function")
axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes[0].legend(frameon=False, fontsize=8)
axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
kept = max(updates, key=lambda update: update.log_marginal_likelihood)
print(f"kept: epoch {kept.epoch}, fit {kept.log_likelihood:.2f} + Occam {kept.occam:.2f} = "
      f"{kept.log_marginal_likelihood:.2f} nats")  # fmt: skip
for switch in result.history.switches:
    print(f"epoch {switch['epoch']}: {switch['layer']} {switch['path']} is {switch['to']}")

# %% [markdown]
# After the kept epoch the evidence falls again, slowly. And the shares have not come to rest: in
# the first layer the paths change places. Convergence of the evidence is not that of every weight.
#
# ## Flavours of evidence
#
# The curvature behind the evidence is approximated, and each way to do so gives another value: a
# *flavour*. Here are four of them, at the same weights, with the same precisions.

# %%
found = {}
for curvature in ("kfac", "ekfac", "diag", "full"):
    state = margeq.laplace.accumulate(
        result.model, evidence_loader, result.likelihood, curvature=curvature
    )
    value = margeq.laplace.log_marginal_likelihood(state, result.prior, result.likelihood)
    found[curvature] = value.item()
    bound = "at most that of the full matrix" if state.flavour.is_bound else "no bound"
    print(f"{curvature:<6} {found[curvature]:9.1f} nats   {bound}")
print(f"result {result.log_marginal_likelihood:9.1f} nats   root {result.flavour.hessian_root!r}")

# %% [markdown]
# `full` is the whole matrix, for small models only. `ekfac` and `diag` lie below it, as they have
# to. `kfac` is no bound. The value of the result differs from `kfac` here by its root: `adaptive`
# leaves out what the captured trace, above, lacks.
#
# Values of different flavours differ by more than what models differ by. So margeq refuses to
# compare them:

# %%
other_flavour = train(("fc",), hessian_root="exact")
try:
    result.log_bayes_factor(other_flavour)
except FlavourMismatchError as error:
    print(error)

# %% [markdown]
# ## Comparing models
#
# Same data, same flavour: then `margeq.compare` ranks.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = {"conv + fc": result, "conv": train(("conv",)), "fc": train(("fc",))}
for warning in caught:
    print(fill(f"{warning.category.__name__}: {warning.message}", 88), end="\n\n")
held_out = {}
for name, one in results.items():
    with torch.no_grad():
        right = one.model.eval()(task.test_images).argmax(1) == task.test_labels
    held_out[name] = {"accuracy": right.float().mean().item()}
print(margeq.compare(results, held_out))

# %% [markdown]
# Two things are to be learned here. Convolutions alone cannot answer, by far: they know no more
# than who guesses, and margeq warns of that, since it is seldom what was wanted. And `fc` alone is
# better than the mixture, by more than 20 nats: the mixed verdict above says what *these two
# starts* ended with, not that both paths are needed. That is why `restarts="auto"` trains each
# path alone too, and why a report says from which starts it comes.
#
# Scores on held-out data stand beside the evidence and decide nothing.
#
# ## The page
#
# `result.report(directory)` writes one HTML file without scripts, which needs no network, its
# figures as PNG and SVG, and the numbers as JSON. `margeq.compare` reads such a directory as well.

# %%
with tempfile.TemporaryDirectory() as directory:
    page = result.report(Path(directory) / "corner")
    for file in sorted(page.parent.iterdir()):
        if file.suffix != ".svg":
            print(file.name)
    display(Image((page.parent / "evidence.png").read_bytes(), width=440))
