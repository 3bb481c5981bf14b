"""The documents as text: their pages, links, headings and code."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BUILT = ("_build", "_notebooks")

FENCED = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`|\$[^$\n]*\$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\bsrc=\"([^\"]+)\"")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """Every page of the site that lies in the repository."""
    found = sorted(DOCS.rglob("*.md"))
    return [page for page in found if page.relative_to(DOCS).parts[0] not in BUILT]


def children(page: Path) -> list[Path]:
    """The pages in the tables of contents of a page, but for notebooks."""
    blocks = TOCTREE.findall(page.read_text())
    entries = [line.strip() for block in blocks for line in block.splitlines()]
    names = [e for e in entries if e and not e.startswith((":", "_notebooks"))]
    return [(page.parent / f"{name}.md").resolve() for name in names]


def links(page: Path) -> list[str]:
    """Where a page points to within the repository."""
    text = re.sub(r"^(    |\t).*$", "", prose(page), flags=re.MULTILINE)
    found = [link or source for link, source in LINK.findall(CODE.sub("", text))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The headings of a page, as a code host names them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    """Lower case, words joined by hyphens, punctuation left out."""
    kept = [c for c in heading.strip().lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def python_blocks(page: Path) -> list[str]:
    """The Python in a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
