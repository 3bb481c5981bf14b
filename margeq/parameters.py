"""Which tensors are weights (integrated out) and which are hyperparameters (optimised)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from margeq.errors import ConfigError, UnsupportedLayerError

__all__ = [
    "LAST_LAYER",
    "LastLayer",
    "log_hyperprior",
    "matches",
    "named_hyperparameters",
    "named_weights",
    "owners",
    "require_names",
    "require_one_device",
    "requiring_grad",
    "unwrapped",
]

_MOST_LISTED = 12
_WRAPPERS = ("torch.nn.parallel.distributed", "torch.nn.parallel.data_parallel", "lightning.fabric")
"""Modules of the classes that hold another module as ``module`` and compute the same."""


LAST_LAYER = "last_layer"


class LastLayer(tuple[str, ...]):
    """Names of the weights of the last layer, see :func:`margeq.last_layer`."""

    __slots__ = ()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what DistributedDataParallel and its like put around it.

    Returns:
        A module whose names have no ``"module."`` in front, and whose calls do not communicate.
    """
    inner = getattr(model, "module", None)
    if type(model).__module__.startswith(_WRAPPERS) and isinstance(inner, nn.Module):
        return unwrapped(inner)
    return model


@contextmanager
def requiring_grad(tensors: Iterable[Tensor], wanted: bool = True) -> Iterator[None]:
    """Leaf tensors require gradients, or none, while the context is open; then as before."""
    flags = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(wanted)
        yield
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def matches(name: str, selection: Sequence[str]) -> bool:
    """Whether ``name`` is one of ``selection`` or lies below one of its module prefixes."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in selection)


def named_hyperparameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable tensors that their layers declare in ``hyperparameter_names``, each once.

    Returns:
        Name -> parameter; a tensor that several layers share has the name of the first.

    Raises:
        ConfigError: if a layer declares a name that it does not have.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in unwrapped(model).named_modules():
        for name in _declared(prefix, module):
            parameter = getattr(module, name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                if all(parameter is not other for other in found.values()):
                    found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


def _declared(prefix: str, module: nn.Module) -> Sequence[str]:
    names = getattr(module, "hyperparameter_names", ())
    if isinstance(names, str) or not all(hasattr(module, name) for name in names):
        raise ConfigError(
            f"{prefix or 'the model'} ({type(module).__name__}) declares "
            f"hyperparameter_names={names!r}; use a tuple of names of its attributes"
        )
    return names


def log_hyperprior(model: nn.Module) -> Tensor:
    """Penalty of the hyperparameters in the evidence, in nats: the sum over layers that have one.

    A layer offers it as ``log_hyperprior()``, a differentiable scalar.

    Returns:
        A scalar, zero for a model without such layers.
    """
    total = torch.zeros(())
    for module in model.modules():
        own = getattr(module, "log_hyperprior", None)
        if own is not None:
            value = own()
            total = total.to(value) + value
    return total


def named_weights(
    model: nn.Module, parameters: str | Sequence[str] = "all"
) -> dict[str, nn.Parameter]:
    """Trainable tensors that the Laplace approximation integrates out, each tensor once.

    Args:
        model: any module tree, also wrapped by DistributedDataParallel.
        parameters: ``"all"``, or names of parameters or modules to keep; the rest stays at its
            point estimate and has no prior. What reads data, such as
            :func:`margeq.optimize_marglik`, also takes ``"last_layer"``.

    Returns:
        Name -> parameter, in the order of ``model.named_parameters()``.

    Raises:
        ConfigError: if an entry of ``parameters`` names nothing that is trained, or there is none.
        UnsupportedLayerError: if two different parameters share one storage.
    """
    hyperparameters = {id(p) for p in named_hyperparameters(model).values()}
    trainable = {
        name: parameter
        for name, parameter in unwrapped(model).named_parameters()
        if parameter.requires_grad and id(parameter) not in hyperparameters
    }
    for name, parameter in trainable.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(
                f"parameter {name!r} belongs to a lazy module without sizes; call the model once"
            )
    _refuse_shared_storage(trainable)
    if isinstance(parameters, str):
        if parameters == "all":
            return trainable
        raise ConfigError(
            f"parameters={parameters!r}: use 'all', 'last_layer' or a sequence of names"
            + (
                "; which layer is the last one, only data tell: use "
                "margeq.last_layer(model, inputs)"
                if parameters == LAST_LAYER
                else f", such as [{parameters!r}]"
            )
        )
    if not parameters:
        raise ConfigError("parameters is empty; name weights or modules, or use 'all'")
    for entry in parameters:
        if not any(matches(name, [entry]) for name in trainable):
            raise ConfigError(_unknown(model, entry, trainable, hyperparameters))
    return {name: p for name, p in trainable.items() if matches(name, parameters)}


def _unknown(
    model: nn.Module, entry: str, trainable: Mapping[str, nn.Parameter], hyperparameters: set[int]
) -> str:
    """Why an entry names no weight, and what was perhaps meant."""
    said = f"parameters: no trainable tensor is called, or lies below, {entry!r}"
    named = dict(unwrapped(model).named_parameters())
    hits = [name for name in named if matches(name, [str(entry)])]
    if hits and all(id(named[name]) in hyperparameters for name in hits):
        return f"{said}: it is a hyperparameter, which the evidence moves; leave it out"
    if hits:
        return f"{said}: it is frozen; unfreeze it with requires_grad_(True), or leave it out"
    modules = {name[:end] for name in trainable for end, c in enumerate(name) if c == "."}
    near = get_close_matches(str(entry), sorted({*trainable, *modules}), n=3)
    if near:
        return f"{said}; did you mean {' or '.join(map(repr, near))}?"
    listed = ", ".join(list(trainable)[:_MOST_LISTED]) or "none"
    more = f" and {len(trainable) - _MOST_LISTED} more" if len(trainable) > _MOST_LISTED else ""
    return f"{said}; the model has {listed}{more}"


def require_one_device(model: nn.Module) -> None:
    """Refuse a model whose parameters and buffers are not in one place, or have no values.

    Raises:
        ConfigError: naming two tensors and their devices.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    by_device: dict[torch.device, str] = {}
    for name, tensor in tensors:
        by_device.setdefault(tensor.device, name)
    places = [f"{name!r} on {device}" for device, name in by_device.items()]
    if len(places) > 1:
        raise ConfigError(
            f"the model is spread over {len(places)} devices ({', '.join(places)}); put all of it "
            f"on one of them with model.to(...)"
        )
    if torch.device("meta") in by_device:
        raise ConfigError(
            f"the model has {places[0]}, where tensors have no values; give it some with "
            f"model.to_empty(device='cpu') and load_state_dict"
        )


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Owning module and local name of every parameter, each tensor once."""
    return {
        f"{prefix}.{local}" if prefix else local: (module, local)
        for prefix, module, local in _walk(model)
    }


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield prefix, module, local


def _refuse_shared_storage(weights: dict[str, nn.Parameter]) -> None:
    by_address: dict[int, str] = {}
    for name, parameter in weights.items():
        if not parameter.numel() or not parameter.data_ptr():
            continue  # nothing to share: empty, or on the meta device
        other = by_address.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise UnsupportedLayerError(
                f"parameters {other!r} and {name!r} are different objects on one storage; tie "
                f"them by assigning the same nn.Parameter to both modules"
            )


def require_names(model: nn.Module, parameters: str | Iterable[object]) -> str | tuple[str, ...]:
    """The choice of weights as names, from any iterable of them.

    Args:
        model: any module tree.
        parameters: as the caller gave it.

    Returns:
        The string itself, the names of a last layer as they are, or all names.

    Raises:
        ConfigError: for an entry that is no name, such as a tensor, with its name if it has one.
    """
    if isinstance(parameters, (str, LastLayer)):
        return parameters
    single = isinstance(parameters, (nn.Module, Tensor)) or not isinstance(parameters, Iterable)
    entries = (parameters,) if single else tuple(parameters)
    for entry in entries:
        if not isinstance(entry, str):
            inner = unwrapped(model)
            known = [*inner.named_parameters(), *inner.named_modules()]
            name = next((name for name, thing in known if thing is entry and name), None)
            called = "" if name is None else f", here {name!r}"
            raise ConfigError(
                f"parameters holds a {type(entry).__name__}; give the names of tensors or modules "
                f"of the model instead{called}"
            )
    return tuple(entry for entry in entries if isinstance(entry, str))
