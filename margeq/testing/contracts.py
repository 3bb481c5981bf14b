"""The contract of a layer type, as one call, and every promise in it.

The checks run in float64 on one core within a second for layers of up to some hundred weights.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from margeq.adjoint import network_gradient
from margeq.curvature.capture import Use, backpropagate, eval_mode
from margeq.curvature.exact import ggn
from margeq.curvature.explained import check_rules
from margeq.curvature.io import InputRows, LinearIO
from margeq.curvature.kron import BlockKron
from margeq.curvature.options import KfacOptions
from margeq.errors import ConfigError
from margeq.laplace import log_marginal_likelihood
from margeq.likelihoods import Categorical
from margeq.linalg import gram
from margeq.parameters import named_hyperparameters, named_weights
from margeq.priors import GaussianPrior
from margeq.testing.subject import TOLERANCE, LayerCase, Subject, require, require_close

__all__ = ["block_mask", "check_layer"]

_STEP = 1e-5


def check_layer(
    case: LayerCase | nn.Module,
    example_input: Tensor | None = None,
    *,
    shared: tuple[str, ...] = (),
    linear: bool = True,
) -> None:
    """Check that a layer type keeps every promise that margeq relies on.

    Per-sample gradients by the curvature rule equal autograd's; the layer is linear in its input
    and equals its ``induced_weight()`` (if it has one); a rule's inputs at sampled positions are
    those of all positions; the Kronecker curvature equals the dense one where it has to, and so do
    its log-determinant and effective number of parameters; the evidence gradient of each declared
    hyperparameter equals its central difference; state dict, ``deepcopy``, dtype,
    ``functional_call`` and ``vmap`` work; flags and hooks are left as they were.

    Args:
        case: a :class:`LayerCase`, or a layer together with ``example_input``.
        example_input: ``[n, ...]`` with at least 2 data; only its shape matters.
        shared: see :class:`LayerCase`; for a layer.
        linear: see :class:`LayerCase`; for a layer.

    Raises:
        ContractError: naming the layer and the first contract that it breaks.
        ConfigError: for a layer without an example input, or too few data.

    Example:
        >>> check_layer(nn.Linear(3, 2), torch.zeros(4, 3))
    """
    if isinstance(case, nn.Module):
        layer = case
        if example_input is None:
            raise ConfigError("check_layer(layer, example_input): pass an input [n, ...]")
        shape = tuple(example_input.shape)
        name = type(layer).__name__
        case = LayerCase(name, lambda: deepcopy(layer), shape, shared, linear)
    if case.input_shape[0] < 2:
        raise ConfigError(f"{case.name}: input_shape={case.input_shape} needs at least 2 data")
    subject = Subject(case)
    for check in _CHECKS:
        with subject.contract(check.__doc__ or check.__name__):
            check(subject)


def block_mask(kron: BlockKron) -> Tensor:
    """Ones where a block-diagonal curvature has entries, ``[P, P]`` in the parameter's layout."""
    ones = BlockKron(
        torch.ones_like(kron.grad_cov),
        torch.ones_like(kron.input_cov),
        torch.ones_like(kron.n_shared),
        kron.layout,
    )
    return ones.to_dense()


def _check_gradients(subject: Subject) -> None:
    """Per-sample gradients by the rule are those of autograd."""
    weights = named_weights(subject.layer)
    require(bool(weights), "the layer has no trainable weight")
    y, uses = subject.uses(subject.x)
    column = subject.random(*y.shape)
    by_rule = _per_sample_by_rule(uses, backpropagate(y, uses, column))
    for n in range(len(subject.x)):
        value = (subject.layer(subject.x[n : n + 1]) * column[n : n + 1]).sum()
        by_autograd = torch.autograd.grad(value, list(weights.values()))
        for (name, weight), expected in zip(weights.items(), by_autograd, strict=True):
            require(name in by_rule, f"the rule says nothing about {name!r}")
            found = by_rule[name][n]
            require(
                found.numel() == weight.numel(),
                f"the rule of {name!r} covers {found.numel()} weights of {weight.numel()}",
            )
            require_close(f"gradient of {name!r} at datum {n}", found.reshape_as(weight), expected)
    check_rules(subject.layer, weights, subject.x)


def _per_sample_by_rule(uses: list[Use], grads: list[Tensor | None]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for use, grad in zip(uses, grads, strict=True):
        if grad is None:
            continue
        # two columns, so that the axis v is really an axis
        columns = torch.stack([torch.zeros_like(grad), grad])
        for local, io in use.rule.io(use.layer, use.x, columns).items():
            if local in use.names:
                product = f"vntbo,ntbi->vn{io.layout}"
                gradient = torch.einsum(product, io.output_grads, io.inputs)[1]
                name = use.names[local]
                total[name] = total[name] + gradient if name in total else gradient
    return total


def _check_linearity(subject: Subject) -> None:
    """The layer is linear in its input, and its induced weight is that map."""
    if not subject.case.linear:
        return
    with eval_mode(subject.layer), torch.no_grad():
        x, other = subject.x, subject.random(*subject.x.shape)
        offset = subject.layer(torch.zeros_like(x))
        mapped, other_mapped = subject.layer(x) - offset, subject.layer(other) - offset
        mixed = subject.layer(0.7 * x - 1.3 * other) - offset
    require_close("f(a x + b x') - f(0)", mixed, 0.7 * mapped - 1.3 * other_mapped)
    induced_weight: Any = getattr(subject.layer, "induced_weight", None)
    if induced_weight is not None:
        matrix = induced_weight()
        require_close("induced_weight() @ x", x.flatten(1) @ matrix.mT, mapped.flatten(1))


def _check_inputs(subject: Subject) -> None:
    """Inputs at sampled positions are those of all positions, in any memory format."""
    strided = subject.x.movedim(1, -1).contiguous().movedim(-1, 1)
    _, uses = subject.uses(subject.x)
    _, strided_uses = subject.uses(strided)
    for use, other in zip(uses, strided_uses, strict=True):
        full = use.rule.io(use.layer, use.x, torch.zeros_like(use.y)[None])
        for x, fraction in ((use.x, 1.0), (use.x, 0.5), (other.x, 1.0), (other.x, 0.5)):
            found = use.rule.inputs(use.layer, x, _Sampler(len(x), fraction))
            for name, rows in found.items():
                _check_frames(name, rows)
            sampled = {name: rows.expanded() for name, rows in found.items()}
            require(set(sampled) == set(full), f"rule names {set(sampled)} and {set(full)}")
            for name, io in full.items():
                _compare_inputs(name, sampled[name], io, fraction)


@dataclass(frozen=True)
class _Sampler:
    """The same share of positions for each datum, the last ones first."""

    n_data: int
    fraction: float

    def __call__(self, n_positions: int) -> Tensor | None:
        count = max(1, round(self.fraction * n_positions))
        if count >= n_positions:
            return None
        return torch.arange(n_positions - 1, n_positions - 1 - count, -1).expand(self.n_data, -1)


def _check_frames(name: str, rows: InputRows) -> None:
    """A covariance taken through the frames is that of the rows in all frames."""
    if rows.frames is not None:
        through_frames = rows.frames.conjugate(gram(rows.rows))
        require_close(f"covariance of {name!r}", through_frames, gram(rows.expanded().rows))


def _compare_inputs(name: str, sampled: InputRows, io: LinearIO, fraction: float) -> None:
    n_data, n_positions = io.inputs.shape[:2]
    require(
        (sampled.n_positions, sampled.layout, sampled.is_bias)
        == (n_positions, io.layout, io.is_bias),
        f"inputs of {name!r} say {sampled.n_positions} positions, layout {sampled.layout}, "
        f"is_bias={sampled.is_bias}; all positions give {n_positions}, {io.layout}, {io.is_bias}",
    )
    # places are sampled, frames never
    expected = io.inputs.unflatten(1, (sampled.n_frames, -1))
    places = _Sampler(n_data, fraction)(n_positions // sampled.n_frames)
    if places is not None and sampled.rows.shape[1] == sampled.n_frames * places.shape[1]:
        expected = expected[torch.arange(n_data)[:, None], :, places].transpose(1, 2)
    expected = expected.flatten(1, 2)
    require_close(f"inputs of {name!r} at {fraction:.0%} of the positions", sampled.rows, expected)


def _check_exactness(subject: Subject) -> None:
    """The curvature of a single datum is exact, except for declared shared weights."""
    model = subject.with_head()
    krons = subject.state(model, 1).kron
    dense = ggn(model, [(subject.x[:1], None)], Categorical())
    start = 0
    for name, kron in krons.items():
        block = dense[start : start + kron.numel, start : start + kron.numel]
        start += kron.numel
        local = name.removeprefix("layer.")
        if local not in subject.case.shared:
            expected = block_mask(kron) * block
            what = f"curvature of {local!r} for one datum (is it used at several positions?)"
            require_close(what, kron.to_dense(), expected)


def _check_eigenvalues(subject: Subject) -> None:
    """Log-determinant and effective number agree with the dense curvature."""
    for name, kron in subject.state(subject.with_head(), len(subject.x)).kron.items():
        dense, log_values = kron.to_dense(), kron.log_eigenvalues(name)[0].flatten()
        eye = torch.eye(len(dense), dtype=dense.dtype)
        values = log_values.exp()
        require_close(f"log det of {name!r}", values.log1p().sum(), torch.logdet(eye + dense))
        effective = torch.linalg.solve(eye + dense, dense).trace()
        require_close(f"effective number of {name!r}", (values / (1 + values)).sum(), effective)


def _check_hyperparameters(subject: Subject) -> None:
    """The evidence gradient of every declared hyperparameter is the central difference."""
    model, n_data = subject.with_head(), len(subject.x)
    prior, likelihood, inside = GaussianPrior(model), Categorical(), named_hyperparameters(model)
    if not inside:
        return
    state, batches = subject.state(model, n_data), subject.batches(n_data)
    found = network_gradient(model, batches, state, prior, likelihood, inside, KfacOptions())
    for name, tensor in inside.items():
        direction, kept = subject.random(*tensor.shape), tensor.detach().clone()
        rise = torch.zeros((), dtype=kept.dtype)
        for step in (_STEP, -_STEP):
            tensor.data = kept + step * direction
            moved = subject.state(model, n_data)
            rise = rise + log_marginal_likelihood(moved, prior, likelihood) / (2.0 * step)
        tensor.data = kept
        slope, rise = float((found[name] * direction).sum()), float(rise.detach())
        require(
            abs(slope - rise) <= 1e-6 * abs(rise) + 1e-7,
            f"gradient of {name.removeprefix('layer.')!r} along a random direction is "
            f"{slope:.8g}, the central difference {rise:.8g} (detached, or used in a rule only?)",
        )


def _check_module(subject: Subject) -> None:
    """State dict and deepcopy give the same function, independent of the original."""
    expected = subject.layer(subject.x)
    loaded = subject.case.make().double()
    loaded.load_state_dict(subject.layer.state_dict())
    copied = deepcopy(subject.layer)
    require_close("output after load_state_dict", loaded(subject.x), expected)
    require_close("output of a deepcopy", copied(subject.x), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.fill_(float("nan"))
    require_close("output after its deepcopy changed", subject.layer(subject.x), expected)


def _check_dtypes(subject: Subject) -> None:
    """Float32 and float64 inputs give outputs of their own dtype."""
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, TOLERANCE)):
        y = deepcopy(subject.layer).to(dtype)(subject.x.to(dtype))
        require(y.dtype == dtype, f"{dtype} input gives {y.dtype} output")
        require_close(f"output in {dtype}", y.double(), subject.layer(subject.x), tol)


def _check_functional(subject: Subject) -> None:
    """functional_call, and vmap over the batch, give the same function."""
    layer = subject.layer
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

    def one(x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, tensors, (x[None],))[0]

    doubled = {name: 2 * parameter for name, parameter in layer.named_parameters()}
    twin = deepcopy(layer)
    twin.load_state_dict({**layer.state_dict(), **doubled})
    called = torch.func.functional_call(layer, doubled, (subject.x,))
    require_close("output of functional_call", called, twin(subject.x))
    require_close("output of vmap", torch.func.vmap(one)(subject.x), layer(subject.x))


def _check_untouched(subject: Subject) -> None:
    """A curvature pass leaves weights, train/eval flags, gradients and hooks as they were."""
    model = subject.with_head()
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    before = _snapshot(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    subject.state(model, len(subject.x))
    require(_snapshot(model) == before, "flags, gradients or hooks have changed")
    for name, tensor in model.state_dict().items():
        require(torch.equal(tensor, values[name]), f"{name!r} has changed")


def _snapshot(model: nn.Module) -> list[object]:
    modules = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    return [*modules, *((p.grad is None, p.requires_grad) for p in model.parameters())]


_CHECKS: tuple[Callable[[Subject], None], ...] = (
    _check_gradients,
    _check_linearity,
    _check_inputs,
    _check_exactness,
    _check_eigenvalues,
    _check_hyperparameters,
    _check_module,
    _check_dtypes,
    _check_functional,
    _check_untouched,
)
