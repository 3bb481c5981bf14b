"""Everything of a user's that a failed call has to leave as it was."""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager

import numpy as np
import torch

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks",
)  # fmt: skip


def copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def snapshot(model):
    """Values, gradients, flags, hooks and attributes of a model, and all global random states."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "state": {k: copied(v) for k, v in model.state_dict().items()},
        "buffers": {k: copied(v) for k, v in model.named_buffers()},
        "gradients": {k: None if p.grad is None else copied(p.grad) for k, p in parameters.items()},
        "identities": {k: id(p) for k, p in parameters.items()},
        "trainable": {k: p.requires_grad for k, p in parameters.items()},
        "flags": {k: m.training for k, m in modules.items()},
        "hooks": {k: [list(getattr(m, h)) for h in _HOOKS] for k, m in modules.items()},
        "tensor hooks": {k: len(p._backward_hooks or ()) for k, p in parameters.items()},
        "attributes": {k: sorted(vars(m)) for k, m in modules.items()},
        "random": {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        },
        "torch": {
            "grad": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "dtype": torch.get_default_dtype(),
        },
    }


def same(one, other):
    """Equality to the last bit, through containers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and (
            torch.equal(one, other) or bool(torch.isnan(one).any())
        )  # fmt: skip
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(before, after):
    changed = [key for key, value in before.items() if not same(value, after[key])]
    assert not changed, changed


@contextmanager
def unchanged(model, *arguments):
    """The body may raise; model, random states and arguments are then as before."""
    before, copies = snapshot(model), copy.deepcopy(arguments)
    yield
    assert_same(before, snapshot(model))
    assert same(arguments, copies)
