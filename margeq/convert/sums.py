"""Path sums as plain modules, with everything folded that is one convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from margeq.convert.folding import folded, scaled
from margeq.convert.plumbing import Added, Scaled, graph_of, parts, sequence

__all__ = ["plain_sum"]

_Terms = dict[str, list[nn.Module]]


def plain_sum(
    paths: Mapping[str, nn.Module],
    scale: float,
    subsample: nn.Module | None,
    before: tuple[str, ...],
) -> nn.Module:
    """The sum of plain paths.

    Args:
        paths: path name -> plain module, of those that are kept.
        scale: factor on the sum.
        subsample: plain module that follows the sum of the paths in ``before``.
        before: their names.

    Returns:
        A module of torch, a sequence of some, or a graph that adds them up.
    """
    terms = {name: parts(path) for name, path in paths.items()}
    early = {name: terms.pop(name) for name in before if name in terms}
    if early and subsample is not None:
        together = "_".join(early)
        terms = {together: [*_added(early, 1.0), *parts(subsample)], **terms}
    return sequence(_added(terms, scale))


def _added(terms: _Terms, scale: float) -> list[nn.Module]:
    head = _common(terms, first=True)
    terms = {name: term[len(head) :] for name, term in terms.items()}
    tail = _common(terms, first=False)
    terms = _folded({name: term[: len(term) - len(tail)] for name, term in terms.items()})
    if scale != 1.0:
        terms, scale = _scaled(terms, scale)
    if len(terms) > 1:
        whole = Added({name: sequence(term) for name, term in terms.items()}, scale)
        return [*head, graph_of(whole, "PathSum"), *tail]
    rest = [graph_of(Scaled(scale), "Scale")] if scale != 1.0 else []
    return [*head, *next(iter(terms.values())), *rest, *tail]


def _common(terms: _Terms, *, first: bool) -> list[nn.Module]:
    """The reshaping with which all terms begin, or end."""
    found: list[nn.Module] = []
    if len(terms) < 2:
        return found
    # at the end only what splits an axis: maps of different shapes can be flattened to one shape
    kinds = nn.Flatten | nn.Unflatten if first else nn.Unflatten
    ordered = [term if first else term[::-1] for term in terms.values()]
    for modules in zip(*ordered, strict=False):
        if not all(isinstance(m, kinds) for m in modules) or len({str(m) for m in modules}) > 1:
            break
        found.append(modules[0])
    return found if first else found[::-1]


def _folded(terms: _Terms) -> _Terms:
    convs = {name: term[0] for name, term in terms.items() if _is_conv(term)}
    others = {name: term for name, term in terms.items() if name not in convs}
    one = [conv for conv in convs.values() if isinstance(conv, nn.Conv2d)]
    if len(one) < 2:
        return terms
    # named after paths: those that are left are no more than these
    found: _Terms = {name: [conv] for name, conv in zip(convs, folded(one), strict=False)}
    return found | others


def _is_conv(term: list[nn.Module]) -> bool:
    return len(term) == 1 and type(term[0]) is nn.Conv2d


def _scaled(terms: _Terms, scale: float) -> tuple[_Terms, float]:
    """The factor inside the filters if all terms have some, and what is left of it."""
    found: _Terms = {}
    for name, term in terms.items():
        if not _is_conv(term):
            return terms, scale
        found[name] = [scaled(cast(nn.Conv2d, term[0]), scale)]
    return found, 1.0
