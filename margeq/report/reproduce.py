"""What it takes to have a result again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from margeq import __version__

__all__ = ["bibtex", "facts"]

_BIBTEX = """@software{margeq,
  title   = {margeq: Bayesian model selection of symmetries for {PyTorch}},
  author  = {{The margeq developers}},
  version = {VERSION}
}

@inproceedings{vanderouderaa2023learning,
  title     = {Learning Layer-wise Equivariances Automatically using Gradients},
  author    = {van der Ouderaa, Tycho F. A. and Immer, Alexander and van der Wilk, Mark},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}

@inproceedings{immer2021scalable,
  title     = {Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning},
  author    = {Immer, Alexander and Bauer, Matthias and Fortuin, Vincent and R{\\"a}tsch, Gunnar
               and Khan, Mohammad Emtiyaz},
  booktitle = {International Conference on Machine Learning},
  year      = {2021}
}"""


def bibtex() -> str:
    """What to cite."""
    return _BIBTEX.replace("VERSION", __version__)


def facts(
    stored: Mapping[str, Any], source: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Name and value of what decides the result, and of what a repetition has to give.

    Args:
        stored: content of ``result.json``.
        source: content of ``config.json``, or nothing.
        named: the results in it.

    Returns:
        Pairs, in reading order.
    """
    config = source.get("config") or stored.get("config") or {}
    found = {
        "command": _command(stored, config),
        "run": source.get("id"),
        "seed": config.get("seed", stored.get("seed")),
        "threads": config.get("threads", stored.get("threads")),
        "versions": ", ".join(f"{k} {v}" for k, v in stored.get("versions", {}).items()),
    }
    factory = source.get("factory")
    if isinstance(factory, Mapping):
        found["file with the task"] = f"{factory.get('path')} (SHA-256 {factory.get('sha256')})"
    for name, plain in named.items():
        of = f" (which {name}?)" if name else ""
        flavour = ", ".join(f"{k} {v}" for k, v in plain["flavour"].items() if k != "is_bound")
        found[f"data{of}"] = f"{plain['n_data']} data, checksum {plain['checksum']}"
        found[f"evidence flavour{of}"] = flavour
        # all digits: the same versions and threads give the very same number
        found[f"log marginal likelihood{of}"] = f"{plain['log_marginal_likelihood']!r} nats"
    return [(name, str(value)) for name, value in found.items() if value not in (None, "")]


def _command(stored: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if "questions" in stored:
        given = {k: config[k] for k in ("seed", "restarts", "epochs", "threads") if k in config}
        options = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in given.items())
        asked = " ".join(map(shlex.quote, stored["questions"]))
        return f"margeq demo {options} --questions {asked}"
    if stored.get("command") == "run":
        return "margeq run --config config.json --out ANOTHER-DIRECTORY"
    return "margeq.optimize_marglik(model, train_loader, ...) in Python"
