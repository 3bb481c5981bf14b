"""Settings of the documentation site; ``make docs`` builds it without a network."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
# before margeq is imported: the checkout's, not an installed one
sys.path[:0] = [str(ROOT), str(HERE / "extensions")]

from margeq import __version__  # noqa: E402

project = "margeq"
author = "The margeq developers"
copyright = author
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "public_names",
    "command_help",
]
# With MathML the pages load no script from elsewhere; MathJax, Sphinx's own choice, is one.
if find_spec("latex2mathml"):
    extensions.append("mathml")
    html_math_renderer = "mathml"
exclude_patterns = ["_build", "_notebooks/contents.md"]
templates_path: list[str] = []

# Markdown: formulas between dollar signs, headings that can be linked to.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# Notebooks come with their output: building the site runs nothing.
nb_execution_mode = "off"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Shapes", "Shapes"),
    ("Reference", "Reference"),
    ("References", "References"),
]

html_theme = "furo"
html_title = f"margeq {release}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False


def copy_notebooks() -> None:
    """Put executed notebooks, and a list of them, where Sphinx looks for pages."""
    target = HERE / "_notebooks"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, target)
    pages = [f"_notebooks/{notebook.stem}" for notebook in notebooks]
    contents = ["```{toctree}", ":maxdepth: 1", "", *pages, "```"]
    if not notebooks:  # an empty list of pages would be a warning
        contents = ["This checkout has no executed notebooks."]
    (target / "contents.md").write_text("\n".join(contents) + "\n")


copy_notebooks()
