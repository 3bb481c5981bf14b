"""The report: one HTML file that needs no network, and its figures as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from margeq.errors import ConfigError
from margeq.printable import printable
from margeq.report.figures import PARTS, Plate, plates
from margeq.report.palette import path_colours
from margeq.report.reproduce import bibtex, facts
from margeq.report.svg import as_svg, drawing, inline_svg, save_figure
from margeq.report.words import evidence_sentence, lights, sentences, tiedness_sentences
from margeq.runs.environment import versions
from margeq.runs.files import write_json, write_text, writing
from margeq.runs.results import REPORT_DATA, results_of

__all__ = ["PAGE", "report_result", "write_report"]

PAGE = "report.html"
_SYMPTOMS = (
    LookupError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration,
    UndefinedError,
)  # fmt: skip


def report_result(plain: Mapping[str, Any], directory: Path) -> Path:
    """Write the report of a result that has no run directory.

    Args:
        plain: as of :meth:`margeq.MargLikResult.to_dict`.
        directory: made if there is none.

    Returns:
        The HTML file.

    Raises:
        ConfigError: if it cannot be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    stored = {"versions": versions(), "threads": torch.get_num_threads(), **plain}
    write_json(directory / REPORT_DATA, stored)
    return write_report(json.loads((directory / REPORT_DATA).read_text("utf-8")), directory)


def write_report(
    stored: Mapping[str, Any], directory: Path, source: Mapping[str, Any] | None = None
) -> Path:
    """Write ``report.html`` and the figures of what ``result.json`` holds.

    Args:
        stored: a result, or the questions of a demonstration.
        directory: existing folder.
        source: what ``config.json`` holds, if there is one.

    Returns:
        The HTML file.

    Raises:
        ConfigError: if it cannot be written, or the content is not that of a result.
    """
    try:
        named = results_of(stored)
        stories = [
            _story(n, plain, name, directory) for n, (name, plain) in enumerate(named.items())
        ]
        page = _template().render(
            title="margeq report",
            stories=stories,
            demo=_demo(stored, named),
            facts=facts(stored, source or {}, named),
            configuration=json.dumps(_configuration(stored, source), indent=1, ensure_ascii=False),
            bibtex=bibtex(),
        )
    except ConfigError:
        raise
    except _SYMPTOMS as error:
        raise ConfigError(
            f"the result in {directory} is not one that this version can report: {error!r}; run it "
            f"again"
        ) from error
    write_text(directory / PAGE, page)
    return directory / PAGE


def _story(number: int, plain: Mapping[str, Any], name: str, directory: Path) -> dict[str, Any]:
    """What the template says about one result."""
    rows = plain["effective_dimension"]["paths"]
    said = {
        "id": f"s{number}",
        "title": f"Which {name}?" if name else "",
        "sentences": sentences(plain),
        "lights": lights(plain),
        "rows": rows,
        "evidence": evidence_sentence(plain),
        "total": plain["log_marginal_likelihood"],
        "per_datum": plain["log_marginal_likelihood"] / plain["n_data"],
        "n_data": plain["n_data"],
        "held_out": _held_out(plain),
        "tiedness": tiedness_sentences(plain),
        "is_bound": plain["flavour"]["is_bound"],
        "colours": path_colours(row["path"] for row in rows if row["path"]),
    }
    drawn: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    with drawing(), writing(directory):
        for plate in plates(plain):
            drawn[plate.part].append(_drawn(plate, number, name, directory))
    return {**said, "figures": drawn}


def _drawn(plate: Plate, number: int, name: str, directory: Path) -> dict[str, Any]:
    svg = as_svg(plate.figure)
    # a name comes from a file: it must not lead out of the directory
    prefix = f"{name}-" if name.isidentifier() else f"{number}-" if name else ""
    stem = f"{prefix}{plate.name}"
    save_figure(plate.figure, svg, directory / stem)
    # made by matplotlib, which escapes the names in it
    inline = Markup(inline_svg(svg, f"{plate.name}-{number}"))
    return {"svg": inline, "alt": plate.alt, "file": stem}


def _held_out(plain: Mapping[str, Any]) -> list[str]:
    scores = dict(plain.get("held_out") or {})
    if "held_out_accuracy" in plain:
        scores["accuracy"] = plain["held_out_accuracy"]
    return [f"{name} {value:.4g}" for name, value in scores.items()]


def _demo(stored: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any] | None:
    """The panel with the known answers: the same network, two questions."""
    if "questions" not in stored:
        return None
    layers = list(dict.fromkeys(
        row["layer"] for plain in named.values() for row in plain["effective_dimension"]["paths"]
        if row["path"]
    ))  # fmt: skip
    return {
        "questions": list(named),
        "layers": [
            {"name": layer, "cells": [_cells(plain, layer) for plain in named.values()]}
            for layer in layers
        ],
        "answers": [_answer(name, plain) for name, plain in named.items()],
    }


def _cells(plain: Mapping[str, Any], layer: str) -> list[str]:
    rows = [r for r in plain["effective_dimension"]["paths"] if r["layer"] == layer and r["path"]]
    return [f"{r['path'].upper()} {r['function_share']:.0%}" for r in rows]


def _answer(name: str, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What has to come out, and whether it has."""
    free = [r for r in plain["effective_dimension"]["paths"] if r["path"] == "fc"]
    if name == "digit":
        known = "A digit means the same wherever it stands: convolutions are enough in every layer."
        came = all(row["verdict"] == "off" for row in free)
    else:
        known = "Convolutions and a mean cannot tell where anything is: some layer has to be free."
        came = any(row["verdict"] != "off" for row in free)
    alone = plain.get("conv_only")
    control = alone and f"CONV only, same training: {alone['held_out_accuracy']:.1%}"
    score = f"held-out digits, never seen: {plain['held_out_accuracy']:.1%}"
    return {"question": name, "known": known, "came": came, "checks": [score, control or ""]}


def _configuration(stored: Mapping[str, Any], source: Mapping[str, Any] | None) -> Any:
    return (source or {}).get("config") or stored.get("config") or {}


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("margeq.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    return environment.get_template(PAGE)


def _visible(value: Any) -> Any:
    """Names as one line of what can be seen; markup of our own as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(map(printable, value.split("\n")))
