"""The notebooks are their scripts, executed: same cells, in order, without errors or machine paths.

Slow: each one still runs. Whether what its text says is still true is for a reader to see.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

from notebooks.build import FOLDER, Cell, read_percent, sources

LARGEST = 400 * 1024
SCRIPTS = sources()
MACHINE = re.compile(r"/(?:tmp|home|root|Users|usr|opt|work|var)/|[A-Z]:\\|site-packages")
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def notebook(script):
    return json.loads(script.with_suffix(".ipynb").read_text("utf-8"))


def joined(text):
    return text if isinstance(text, str) else "".join(text)


def code_cells(script):
    return [cell for cell in notebook(script)["cells"] if cell["cell_type"] == "code"]


def texts(script):
    """All text in the outputs; pictures are left out."""
    for cell in code_cells(script):
        for output in cell["outputs"]:
            yield joined(output.get("text", ""))
            for kind, value in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield joined(value)


def test_there_are_six_scripts_and_no_notebook_without_one():
    assert [script.stem[:2] for script in SCRIPTS] == ["01", "02", "03", "04", "05", "06"]
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SCRIPTS}


def test_cells_are_read_as_they_stand():
    text = "# header\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # %% no cell\n\n\n"
    text += "# %%\n# a comment\ny = 2\n"
    assert read_percent(text) == [
        Cell("markdown", "# Title\n\nText."),
        Cell("code", "x = 1  # %% no cell"),
        Cell("code", "# a comment\ny = 2"),
    ]


@each
def test_cells_are_those_of_the_script(script):
    cells = [Cell(c["cell_type"], joined(c["source"])) for c in notebook(script)["cells"]]
    assert cells == read_percent(script.read_text("utf-8"))


@each
def test_jupytext_reads_the_same_cells(script):
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    cells = [Cell(cell.cell_type, cell.source) for cell in jupytext.read(script).cells]
    assert cells == read_percent(script.read_text("utf-8"))


@each
def test_all_cells_were_run_in_order_without_errors_or_warnings(script):
    cells = code_cells(script)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert all(o["name"] == "stdout" for o in outputs if o["output_type"] == "stream")


@each
def test_outputs_are_small_and_of_no_machine(script):
    assert script.with_suffix(".ipynb").stat().st_size <= LARGEST
    assert not [text for text in texts(script) if MACHINE.search(text)]


@each
def test_nothing_is_kept_that_changes_from_run_to_run(script):
    content = notebook(script)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell["id"] for cell in content["cells"]] == [
        f"cell-{number}" for number in range(1, len(content["cells"]) + 1)
    ]
    assert all(cell["metadata"] == {} for cell in content["cells"])
    for cell in code_cells(script):
        assert all(output.get("metadata", {}) == {} for output in cell["outputs"])


@pytest.mark.slow
@each
def test_it_runs(script):
    if importlib.util.find_spec("nbmake") is None:
        pytest.skip("nbmake is not installed")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command += ["--rootdir", str(FOLDER), "--nbmake", "--nbmake-timeout=600", "-q"]
    path = script.with_suffix(".ipynb")
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
