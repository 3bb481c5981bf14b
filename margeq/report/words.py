"""A result in sentences, from its plain data: what each layer chose, and whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = [
    "Light",
    "evidence_sentence",
    "kept_start",
    "lights",
    "noise_line",
    "sentences",
    "tiedness_sentences",
]

_MOST_NOISES = 8
FINE, CAREFUL, BAD, UNKNOWN = "fine", "take care", "problem", "unknown"


@dataclass(frozen=True)
class Light:
    """One diagnostic.

    Attributes:
        name: what is looked at.
        state: ``"fine"``, ``"take care"``, ``"problem"`` or ``"unknown"``.
        words: what was seen, and what to do about it.
    """

    name: str
    state: str
    words: str


def sentences(plain: Mapping[str, Any]) -> list[str]:
    """A sentence per layer with candidate paths, and one per gate."""
    table = plain["effective_dimension"]
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for row in table["paths"]:
        if row["path"]:
            layers.setdefault(row["layer"], []).append(row)
    said = [_layer_sentence(layer or "the model", rows) for layer, rows in layers.items()]
    said += [f"{line}." for line in table["subset_lines"]]
    return said or [
        "No layer has candidate paths or gates: the evidence chose prior precisions and noise."
    ]


def _layer_sentence(layer: str, rows: Sequence[Mapping[str, Any]]) -> str:
    by_share = sorted(rows, key=lambda row: -row["function_share"])
    first, others = by_share[0], by_share[1:]
    if not any(row["verdict"] for row in rows):
        return (
            f"{layer}: its output does not vary over the data, so its paths cannot be told apart."
        )
    if len(rows) == 1:
        return f"{layer} has one path, {_name(first)}: nothing to choose from."
    if first["verdict"] == "selected":
        off = _listed([_name(row) for row in others])
        share = _share(first)
        return f"{layer} chose {_name(first)}: {share} of its function's variance; {off} off."
    on = [f"{_name(row)} ({_share(row)})" for row in by_share if row["verdict"] != "off"]
    off = [_name(row) for row in by_share if row["verdict"] == "off"]
    end = f"; {_listed(off)} off" if off else ""
    if len(on) == 1:
        return f"{layer} uses {on[0]} of its function's variance{end}."
    return f"{layer} mixes {_and(on)} of its function's variance{end}: no path is enough alone."


def kept_start(plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """The start whose weights the model holds."""
    (kept,) = (restart for restart in plain["restarts"] if restart["kept"])
    return kept


def lights(plain: Mapping[str, Any]) -> list[Light]:
    """The diagnostics that tell whether to believe the evidence."""
    return [
        _converged(plain),
        _starts(plain),
        _clamped(plain["diagnostics"]["clamped_eigenvalues"]),
        _bounds(plain),
        _captured(plain),
    ]


def _converged(plain: Mapping[str, Any]) -> Light:
    slope = plain["diagnostics"]["slope"]
    if slope is None:
        return Light("converged", UNKNOWN, f"{plain['message']}.")
    seen = f"slope {slope:.2g} nats per datum and epoch over the last updates"
    return Light(
        "converged", FINE if plain["success"] else CAREFUL, f"{plain['message']} ({seen})."
    )


def _starts(plain: Mapping[str, Any]) -> Light:
    name, n_data = "starts", plain["n_data"]
    failed = [restart["start"] for restart in plain["restarts"] if restart["error"]]
    kept = kept_start(plain)
    others = [restart for restart in plain["restarts"] if not (restart["error"] or restart["kept"])]
    fell = f" Failed: {', '.join(failed)}." if failed else ""
    if not others:
        words = f"only the start {kept['start']} finished: another one might have ended elsewhere."
        return Light(name, CAREFUL, words + fell)
    second = max(others, key=lambda restart: restart["log_marginal_likelihood"])
    ahead = kept["log_marginal_likelihood"] - second["log_marginal_likelihood"]
    spread = plain["diagnostics"]["restart_spread"]
    words = (
        f"{kept['start']} is kept, {ahead:.4g} nats ({ahead / n_data:.2g} per datum) ahead of "
        f"{second['start']}; best and worst of {len(others) + 1} differ by {spread:.4g} nats "
        f"({spread / n_data:.2g} per datum)."
    )
    return Light(name, CAREFUL if failed or ahead < 3.0 else FINE, words + fell)


def _clamped(count: int) -> Light:
    if not count:
        return Light("curvature", FINE, "no eigenvalue had to be set to zero.")
    words = f"{count} clearly negative eigenvalues were set to zero: try float64."
    return Light("curvature", CAREFUL, words)


def _bounds(plain: Mapping[str, Any]) -> Light:
    name, groups = "precisions", plain["diagnostics"]["at_bounds"]
    if not groups:
        return Light(name, FINE, "none sits at a bound.")
    off = [
        f"{row['layer']}.paths.{row['path']}.".removeprefix(".")
        for row in plain["effective_dimension"]["paths"]
        if row["path"] and row["verdict"] == "off"
    ]
    members: dict[str, list[str]] = {}
    for tensor, group in plain["prior_groups"].items():
        members.setdefault(group, []).append(tensor)
    live = [
        group for group in groups if not _all_below(members.get(group, [group]), off)
    ]  # fmt: skip
    if not live:
        return Light(name, FINE, f"{len(groups)} at a bound, all of paths that are off.")
    listed = ", ".join(live[:5]) + (", …" if len(live) > 5 else "")
    return Light(name, CAREFUL, f"{len(live)} at a bound outside of paths that are off: {listed}.")


def _all_below(tensors: Sequence[str], prefixes: Sequence[str]) -> bool:
    return all(any(tensor.startswith(prefix) for prefix in prefixes) for tensor in tensors)


def _captured(plain: Mapping[str, Any]) -> Light:
    name, share = "captured trace", plain["diagnostics"]["captured_trace"]
    if share is None:
        return Light(name, UNKNOWN, "the share of the curvature behind the evidence is not known.")
    words = f"{share:.2%} of the output Hessian's trace is behind the evidence"
    if share >= 0.99:
        return Light(name, FINE, f"{words}.")
    return Light(
        name, CAREFUL if share >= 0.9 else BAD, f"{words}: what is left out makes it too high."
    )


def evidence_sentence(plain: Mapping[str, Any]) -> str:
    """The kept evidence as the sum of its terms, and what the pair means."""
    n_data, total = plain["n_data"], plain["log_marginal_likelihood"]
    updates = kept_start(plain)["history"]["updates"]
    kept = min(updates, key=lambda update: abs(update["log_marginal_likelihood"] - total))
    fit, occam = kept["log_likelihood"], kept["occam"]
    rest = kept["log_marginal_likelihood"] - fit - occam
    penalty = ""
    if abs(rest) > 1e-6 * max(1.0, abs(total)):
        penalty = f" and a penalty of hyperparameters inside the network of {rest / n_data:.3f}"
    return (
        f"Per datum the evidence of {total / n_data:.3f} nats is a fit of {fit / n_data:.3f} plus "
        f"an Occam term of {occam / n_data:.3f}{penalty}. More weights can only improve the fit; "
        f"each one that the data determine costs in the Occam term. A path stays only if it "
        f"improves the fit by more than it costs: that is why no validation set is needed."
        f"{_noise_sentence(plain)}"
    )


def _noise_sentence(plain: Mapping[str, Any]) -> str:
    line = noise_line(plain)
    return f" Noise of the targets: {line}." if line else ""


def noise_line(plain: Mapping[str, Any]) -> str:
    """The noise of the targets, one or one per output; empty for classification."""
    noise = plain.get("likelihood", {}).get("sigma_noise")
    if noise is None:
        return ""
    if not isinstance(noise, list):
        return f"{noise:.3g}"
    if len(noise) <= _MOST_NOISES:
        return f"{', '.join(f'{value:.3g}' for value in noise)} (one per output)"
    low, middle, high = min(noise), median(noise), max(noise)
    return f"{low:.3g} to {high:.3g}, median {middle:.3g} (one for each of {len(noise)} outputs)"


def tiedness_sentences(plain: Mapping[str, Any]) -> list[str]:
    """How near free maps that are in use are to convolutions."""
    off = [(r["layer"], r["path"]) for r in plain["effective_dimension"]["paths"]
           if r["verdict"] == "off"]  # fmt: skip
    return [
        f"{p['layer']} {p['path'].upper()}: translation-tiedness {p['tiedness']:.1%}, where "
        f"independent weights have {p['independent']:.1%} on average."
        for p in plain["pictures"]
        if p.get("tiedness") is not None and (p["layer"], p["path"]) not in off
    ]


def _name(row: Mapping[str, Any]) -> str:
    return row["path"].upper()


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['function_share']:.0%}" if row["function_share"] < 0.995 else "all"


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _listed(names: Sequence[str]) -> str:
    return f"{_and(names)} {'is' if len(names) == 1 else 'are'}"
