"""Models or runs on the same data, ranked by evidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from margeq.errors import ConfigError, FlavourMismatchError
from margeq.printable import printable
from margeq.runs.results import read_result
from margeq.runs.verdicts import verdicts

if TYPE_CHECKING:
    from margeq.training.result import MargLikResult

__all__ = ["Compared", "Comparison", "compare"]

Subject = Union["MargLikResult", str, Path]
_SYMPTOMS = (LookupError, TypeError, ValueError, AttributeError, StopIteration)


@dataclass(frozen=True)
class Compared:
    """One of the results.

    Attributes:
        name: as given, or that of its directory.
        log_marginal_likelihood: nats, total over the data.
        difference: to the best, in nats; 0 for the best, negative for the others.
        difference_per_datum: the same per datum.
        effective: effective parameters, of all weights in the evidence.
        parameters: number of these weights.
        held_out: scores on data that nothing was tuned on, by name.
        start: the start that was kept.
        success: as in :class:`margeq.MargLikResult`.
        verdicts: layer -> path, or mixture of paths.
    """

    name: str
    log_marginal_likelihood: float
    difference: float
    difference_per_datum: float
    effective: float
    parameters: int
    held_out: Mapping[str, float]
    start: str
    success: bool
    verdicts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Results from the highest evidence to the lowest; ``print`` it, or read its parts.

    Attributes:
        ranking: best first.
        n_data: number of data, the same for all.
        checksum: of the data.
        flavour: of the evidence.
    """

    ranking: tuple[Compared, ...]
    n_data: int
    checksum: str
    flavour: Mapping[str, Any]

    @property
    def best(self) -> Compared:
        """That of the highest evidence."""
        return self.ranking[0]

    @property
    def notes(self) -> list[str]:
        """What to keep in mind."""
        found = [f"{self.n_data:,} data; differences to {self.best.name} in nats"]
        doubtful = [entry.name for entry in self.ranking if not entry.success]
        if doubtful:
            found.append(f"no success, see result.message; may change: {', '.join(doubtful)}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "ranking": [asdict(entry) for entry in self.ranking],
            "n_data": self.n_data,
            "checksum": self.checksum,
            "flavour": dict(self.flavour),
        }

    def cells(self) -> list[list[str]]:
        """Header and rows of the table."""
        scores = list(dict.fromkeys(name for entry in self.ranking for name in entry.held_out))
        header = ["", "evidence", "difference", "per datum", "effective", "parameters", *scores]
        rows = [
            [
                entry.name,
                f"{entry.log_marginal_likelihood:.2f}",
                f"{entry.difference:.2f}",
                f"{entry.difference_per_datum:.4f}",
                f"{entry.effective:.1f}",
                f"{entry.parameters:,}",
                *(f"{entry.held_out[s]:.4g}" if s in entry.held_out else "" for s in scores),
            ]
            for entry in self.ranking
        ]
        return [header, *rows]

    def __str__(self) -> str:
        """A table, and notes below it."""
        rows = [[printable(cell) for cell in row] for row in self.cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join([*lines, *map(printable, self.notes)])


def compare(
    results: Mapping[str, Subject] | Iterable[Subject],
    held_out: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """Rank results on the same data by their evidence.

    A difference of ``d`` nats means that the data are ``exp(d)`` times as probable under the model
    of higher evidence (the Bayes factor).

    Args:
        results: name -> what :func:`margeq.optimize_marglik` returned, or the directory of a
            finished run or of a report. Without names, directories go by theirs and results by
            their numbers.
        held_out: name -> scores by name, on data that nothing was tuned on; run directories bring
            their own.

    Returns:
        The ranking.

    Raises:
        ConfigError: for no results, other data, two of the same name, or a directory without a
            result.
        FlavourMismatchError: for evidence that was approximated differently.

    Example:
        >>> import torch, margeq
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> y = 2 * x + 1 + 0.1 * torch.cos(40 * x)
        >>> results = {
        ...     name: margeq.optimize_marglik(
        ...         torch.nn.Linear(1, 1, bias=name == "affine"), [(x, y)], n_epochs=100,
        ...         likelihood="regression", optimizer_kwargs={"lr": 0.1}, seed=0)
        ...     for name in ("linear", "affine")}
        >>> margeq.compare(results).best.name
        'affine'
    """
    plain = {name: _plain(subject, name) for name, subject in _named(results).items()}
    if not plain:
        raise ConfigError("nothing to compare; give results or run directories")
    _require_known(plain, held_out or {})
    (first_name, first), *others = plain.items()
    for name, other in others:
        _require_comparable(first_name, first, name, other)
    best = max(entry["log_marginal_likelihood"] for entry in plain.values())
    entries = [
        _entry(name, entry, best, (held_out or {}).get(name)) for name, entry in plain.items()
    ]
    entries.sort(key=lambda entry: -entry.log_marginal_likelihood)
    return Comparison(tuple(entries), first["n_data"], first["checksum"], first["flavour"])


def _require_known(plain: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    unknown = set(scores) - set(plain)
    if unknown:
        raise ConfigError(
            f"held_out has scores of {', '.join(sorted(unknown))}, but there is no such result; "
            f"there are {', '.join(plain)}"
        )


def _named(results: Mapping[str, Subject] | Iterable[Subject]) -> dict[str, Subject]:
    if isinstance(results, Mapping):
        return {str(name): subject for name, subject in results.items()}
    if isinstance(results, (str, Path)) or not isinstance(results, Iterable):
        raise ConfigError(
            f"results is a {type(results).__name__}; give a mapping of names to results, or a list"
        )
    subjects = list(results)
    last_parts = [Path(s).resolve().name for s in subjects if isinstance(s, (str, Path))]
    found: dict[str, Subject] = {}
    for number, subject in enumerate(subjects, 1):
        name = f"#{number}"
        if isinstance(subject, (str, Path)):
            name = Path(subject).resolve().name
            # the last part is enough where it tells the directories apart
            name = name if last_parts.count(name) == 1 else str(subject)
        if name in found:
            raise ConfigError(f"{name} is given twice")
        found[name] = subject
    return found


def _plain(subject: Subject, name: str) -> Mapping[str, Any]:
    """What a comparison needs, as plain data."""
    if isinstance(subject, (str, Path)):
        stored = read_result(Path(subject))
    elif hasattr(subject, "to_dict"):
        stored = subject.to_dict()
    else:
        raise ConfigError(
            f"{name} is a {type(subject).__name__}, expected a result or a run directory"
        )
    if "questions" in stored:
        raise ConfigError(
            f"{name} is a demonstration, whose two questions are about different data; compare "
            f"runs, such as those of margeq run --task digit"
        )
    if "checksum" not in stored:
        raise ConfigError(
            f"{name} does not say which data it is about, as results of earlier versions do not; "
            f"run it again"
        )
    try:
        return _needed(stored)
    except _SYMPTOMS as error:
        raise ConfigError(f"{name} holds no result that can be compared: {error!r}") from error


def _needed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a comparison needs; whatever is wrong with them is found here."""
    rows = [row for row in stored["effective_dimension"]["tensors"] if not row["frozen"]]
    value = float(stored["log_marginal_likelihood"])
    if not math.isfinite(value):
        raise ValueError(f"log_marginal_likelihood {value}")
    return {
        "log_marginal_likelihood": value,
        "n_data": int(stored["n_data"]),
        "checksum": str(stored["checksum"]),
        "flavour": dict(stored["flavour"]),
        "effective": float(sum(row["effective"] for row in rows)),
        "parameters": int(sum(row["parameters"] for row in rows)),
        "held_out": {str(k): float(v) for k, v in (stored.get("held_out") or {}).items()},
        "start": str(next(r["start"] for r in stored["restarts"] if r["kept"])),
        "success": bool(stored["success"]),
        "verdicts": verdicts(stored),
    }


def _require_comparable(
    first_name: str, first: Mapping[str, Any], name: str, other: Mapping[str, Any]
) -> None:
    """Refuse other data and other approximations, naming both.

    Raises:
        ConfigError: for other data.
        FlavourMismatchError: for another flavour, naming each field that differs.
    """
    if first["n_data"] != other["n_data"]:
        raise ConfigError(
            f"{first_name} is about {first['n_data']} data and {name} about {other['n_data']}; "
            f"compare models on the same data"
        )
    if first["checksum"] != other["checksum"]:
        raise ConfigError(
            f"{first_name} and {name} are about other inputs or targets; compare on the same data"
        )
    mine, theirs = first["flavour"], other["flavour"]
    differing = [
        f"{key}: {mine.get(key)!r} against {theirs.get(key)!r}"
        for key in dict.fromkeys([*mine, *theirs])
        if mine.get(key) != theirs.get(key)
    ]
    if differing:
        raise FlavourMismatchError(
            f"evidence of {first_name} and {name} cannot be compared ({'; '.join(differing)}); "
            f"recompute both with the same options"
        )


def _entry(
    name: str, plain: Mapping[str, Any], best: float, held_out: Mapping[str, float] | None
) -> Compared:
    difference = plain["log_marginal_likelihood"] - best
    return Compared(
        name=name,
        log_marginal_likelihood=plain["log_marginal_likelihood"],
        difference=difference,
        difference_per_datum=difference / plain["n_data"],
        effective=plain["effective"],
        parameters=plain["parameters"],
        held_out=dict(plain["held_out"] if held_out is None else held_out),
        start=plain["start"],
        success=plain["success"],
        verdicts=plain["verdicts"],
    )
