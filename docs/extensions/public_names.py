"""The directive ``public-names``: one entry for each public name of a module.

    ```{public-names} margeq.layers
    ```

becomes a table of the names in ``__all__``, one line each, followed by their docstrings. A new name
needs no new line in any page.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import margeq

SECTION = re.compile(
    r"^(Args|Attributes|Example|Examples|Raises|References?|Returns|Shapes|Yields):"
)


class PublicNames(SphinxDirective):
    """A module's docstring, a table of its names, and an entry for each."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the directives of autodoc and parse them."""
        module = import_module(self.arguments[0])
        text = "\n".join(entries(module))
        return self.parse_text_to_nodes(text, allow_section_headings=False)


def public(module: ModuleType) -> list[str]:
    """Names in ``__all__`` that are neither private nor modules, which have pages of their own."""
    names = getattr(module, "__all__", ())
    return [
        name
        for name in names
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    ]


def entries(module: ModuleType) -> Iterator[str]:
    """Lines of MyST that hold reStructuredText.

    What ``margeq`` itself has too is described there, and only pointed at elsewhere.

    Yields:
        Lines.
    """
    names, elsewhere = public(module), []
    if module is not margeq:
        top = {id(getattr(margeq, name)): name for name in public(margeq)}
        elsewhere = [top[id(getattr(module, name))] for name in names if _is_in(module, name, top)]
        names = [name for name in names if not _is_in(module, name, top)]
    yield "```{eval-rst}"
    yield f".. automodule:: {module.__name__}\n"
    if names:
        yield ".. list-table::\n   :widths: auto\n"
        for name in names:
            full = f"{module.__name__}.{name}"
            yield f"   * - :py:obj:`{name} <{full}>`\n     - {first_line(module, name)}"
        yield ""
    if elsewhere:
        yield "Also here: " + ", ".join(f":py:obj:`margeq.{name}`" for name in elsewhere) + ".\n"
    for name in names:
        member = getattr(module, name)
        if is_documented(member):
            yield f".. {directive(member)}:: {name}"
            yield from (f"   {option}" for option in options(member))
        else:
            yield f".. py:data:: {name}\n"
            yield from (f"   {line}" for line in data_docstring(name))
        yield ""
    yield "```"


def first_line(module: ModuleType, name: str) -> str:
    """What an object says of itself in a line."""
    member = getattr(module, name)
    lines = (inspect.getdoc(member) or "").splitlines() if is_documented(member) else []
    return (lines or data_docstring(name) or [""])[0]


def is_documented(member: Any) -> bool:
    """Whether the docstring is the object's own: that of a constant is its class's."""
    return inspect.isclass(member) or inspect.isroutine(member)


def data_docstring(name: str) -> list[str]:
    """The string below the assignment of a constant, in whichever module that is."""
    for home in [home for title, home in sys.modules.items() if title.startswith("margeq.")]:
        if name in vars(home) and getattr(home, "__file__", None):
            found = ModuleAnalyzer.for_module(home.__name__).find_attr_docs().get(("", name))
            if found:
                return found
    return []


def _is_in(module: ModuleType, name: str, known: dict[int, str]) -> bool:
    return id(getattr(module, name)) in known


def directive(member: Any) -> str:
    """The directive of autodoc for an object."""
    if inspect.isclass(member):
        return "autoexception" if issubclass(member, BaseException) else "autoclass"
    return "autofunction"


def options(member: Any) -> list[str]:
    """Classes show their own methods, and what they derive from."""
    if not inspect.isclass(member):
        return []
    return [":members:"] + [":show-inheritance:"] * (member.__bases__ != (object,))


def literal_equations(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Indented paragraphs before the first section are equations or code: leave them as they are.

    The docstrings are written to be read as they stand, without ``::`` before each equation.
    """
    if what in ("attribute", "data", "property") and lines and ": " in lines[0]:
        lines[:] = ["..", "", *lines]  # napoleon takes what stands before a colon for a type
    out: list[str] = []
    inside = False
    for number, line in enumerate(lines):
        if SECTION.match(line):
            lines[:] = [*out, *lines[number:]]
            return
        indented = line.startswith("    ")
        starts = indented and not inside and (not out or not out[-1].strip())
        if starts and not _announced(out):
            out += ["::", ""]
        if line.strip():
            inside = indented
        out.append(line)
    lines[:] = out


def _announced(lines: list[str]) -> bool:
    """Whether the last line says that what follows is literal, or is an item of a list."""
    text = [line for line in lines if line.strip()]
    return bool(text) and (text[-1].endswith("::") or text[-1].lstrip().startswith((".. ", "- ")))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("public-names", PublicNames)
    # before napoleon, which has the default priority
    app.connect("autodoc-process-docstring", literal_equations, priority=400)
    return {"parallel_read_safe": True}
