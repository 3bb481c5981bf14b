"""Run the scripts of this folder and keep what they show: ``python notebooks/build.py [NAME ...]``.

Each ``NN_title.py`` is a notebook in the percent format, and the source; ``NN_title.ipynb`` beside
it is the same with outputs. What differs from machine to machine or from run to run (timings,
identifiers, versions, widgets) is left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
_TIMEOUT = 600  # seconds per cell


class Cell(NamedTuple):
    """One cell: ``"code"`` or ``"markdown"``, and its text."""

    kind: str
    source: str


def sources() -> list[Path]:
    """The scripts that are notebooks, in their order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read_percent(text: str) -> list[Cell]:
    """The cells of a script in the percent format, as jupytext reads them.

    A cell begins with a line ``# %%`` or ``# %% [markdown]``; lines of text begin with ``#``. What
    stands before the first cell is a header.
    """
    cells: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.rstrip() in ("# %%", "# %% [markdown]"):
            cells.append(("markdown" if "markdown" in line else "code", []))
        elif cells:
            kind, lines = cells[-1]
            lines.append(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line)
    return [Cell(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


def build(script: Path) -> None:
    """Execute a script cell by cell and write its notebook, without anything that is not a result.

    Args:
        script: in the percent format.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook()
    for number, (kind, source) in enumerate(read_percent(script.read_text("utf-8")), 1):
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(make(source, id=f"cell-{number}"))
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    path = {"metadata": {"path": str(script.parent)}}
    NotebookClient(
        notebook,
        timeout=_TIMEOUT,
        kernel_name="python3",
        resources=path,
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = {}
    nbformat.validate(notebook)
    script.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n", "utf-8")


def main(names: list[str]) -> None:
    """Build all notebooks, or those whose names begin as given."""
    for script in sources():
        if not names or any(script.name.startswith(name) for name in names):
            began = time.perf_counter()
            build(script)
            size = script.with_suffix(".ipynb").stat().st_size
            print(f"{script.stem}: {time.perf_counter() - began:.0f} s, {size / 1024:.0f} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
