"""Formulas as MathML, which browsers show without a script: the pages need no network."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

_log = getLogger(__name__)


def markup(formula: str, display: str) -> str:
    """MathML of a formula in TeX, set as TeX would set it where the converter does not."""
    text = convert(formula, display=display)
    if "\\" in text:
        _log.warning("a part of %r is not known to latex2mathml", formula)
    # a thin space between a function and its argument, unless that is in parentheses
    text = re.sub(
        r"(<m[io][^>]*>(?:log|det|exp)</m[io]>)(?!<mo)", r'\1<mspace width="0.17em"/>', text
    )
    # norms as tall as letters, so that an exponent does not move one of the bars
    return text.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def inline(writer: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(markup(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    writer.body.append(f'<div class="math-block">{markup(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
