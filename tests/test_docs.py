"""The documentation is complete and holds together: names, pages, links, tests that it names."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType

import pytest

import margeq
from tests.documents import DOCS, ROOT, anchors, children, links, pages, prose
from tests.test_promises import functions_in

REFERENCE = sorted((DOCS / "api").glob("*.md"))
PAGES = [*pages(), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


def named(page):
    return page.relative_to(ROOT).as_posix()


def public_modules(module: ModuleType) -> set[str]:
    """The module and those that it offers by name, and what they offer."""
    names = [name for name in getattr(module, "__all__", ()) if not name.startswith("_")]
    inner = [getattr(module, name) for name in names]
    found = [public_modules(member) for member in inner if isinstance(member, ModuleType)]
    return {module.__name__}.union(*found)


def offered(module: ModuleType) -> list[str]:
    return [
        name
        for name in getattr(module, "__all__", ())
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    ]


def documented_modules() -> set[str]:
    """Modules all of whose names the reference shows."""
    text = "\n".join(page.read_text() for page in REFERENCE)
    return set(re.findall(r"^```\{public-names\} ([\w.]+)$", text, re.MULTILINE))


def explained_constants(module: ModuleType) -> set[str]:
    """Constants with a string below their assignment, or ``#:`` above it."""
    source = inspect.getsource(module)
    body = ast.parse(source).body
    found = set(re.findall(r"^#: .*\n(\w+) =", source, re.MULTILINE))
    for statement, after in pairwise(body):
        if isinstance(statement, ast.Assign) and isinstance(after, ast.Expr):
            is_text = isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            found |= set(names) if is_text else set()
    return found


def is_explained(module: ModuleType, name: str) -> bool:
    member = getattr(module, name)
    if inspect.isclass(member) or inspect.isroutine(member):
        return bool(member.__doc__)
    homes = [home for title, home in sys.modules.items() if title.startswith("margeq.")]
    return any(name in vars(home) and name in explained_constants(home) for home in homes)


def test_every_public_module_has_a_page_in_the_reference():
    missing = public_modules(margeq) - documented_modules()
    assert not missing, "add docs/api/NAME.md with ```{public-names} margeq.NAME```"


@pytest.mark.parametrize("name", sorted(documented_modules()))
def test_every_public_name_says_what_it_is(name):
    module = import_module(name)
    assert module.__doc__
    assert not [member for member in offered(module) if not is_explained(module, member)]


def test_the_search_for_explanations_finds_what_has_none():
    module = ModuleType("margeq.nothing")
    module.silent = lambda: None
    module.NUMBER = 1
    assert not is_explained(module, "silent")
    assert not is_explained(module, "NUMBER")
    assert is_explained(import_module("margeq.groups"), "P4")


def test_every_page_is_reachable_from_the_index():
    reached, to_visit = set(), [DOCS / "index.md"]
    while to_visit:
        page = to_visit.pop()
        reached.add(page)
        to_visit += [child for child in children(page) if child not in reached]
    assert not [named(page) for page in reached if not page.exists()]
    assert not [named(page) for page in pages() if page not in reached]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), link
        if anchor and found.name != "contributing.md":  # whose text is that of CONTRIBUTING.md
            assert anchor in anchors(found), link


def test_the_search_for_links_finds_them():
    found = links(ROOT / "README.md")
    assert "docs/images/verdict.png" in found
    assert "docs/tutorial.md" in found
    assert len(found) > 20


def test_headings_have_the_names_of_a_code_host():
    assert "whose-curvature" in anchors(DOCS / "uncertainty.md")
    assert "effective-dimension-function-share-verdicts" in anchors(DOCS / "verdicts.md")


def test_every_test_that_is_named_exists():
    found = re.findall(r"`(test_\w+\.py)::(test_\w+)`", prose(DOCS / "exactness.md"))
    assert len(found) > 60
    assert not [f"{f}::{t}" for f, t in found if t not in functions_in(ROOT / "tests" / f)]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(find_spec(name) for name in ("sphinx", "furo", "myst_nb")),
    reason="the site needs the extra docs",
)
def test_the_site_builds_without_a_warning_and_shows_every_name(tmp_path):
    arguments = ["-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "trees"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, DOCS, tmp_path / "html"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = "".join(page.read_text() for page in (tmp_path / "html" / "api").glob("*.html"))
    for name in documented_modules():
        module = import_module(name)
        for member in offered(module):
            is_top = any(getattr(module, member) is getattr(margeq, top) for top in offered(margeq))
            home = "margeq" if is_top else name
            assert f'id="{home}.{member}"' in shown, f"{name}.{member}"
