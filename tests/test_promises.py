"""The list of promises is complete: its tests exist, and every error and warning has one."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from margeq import errors

TESTS = Path(__file__).parent
LIST = TESTS.parent / "docs" / "promises.md"

ITEMS = [
    *(f"R{n}" for n in range(1, 11)), *(f"K{n}" for n in range(1, 8)),
    *(f"S{n}" for n in range(1, 11)), *(f"D{n}" for n in range(1, 19)), "M1–M8",
    *(f"M{n}" for n in range(9, 17)), *(f"N{n}" for n in range(1, 9)),
    *(f"P{n}" for n in range(1, 11)), "Soak",
]  # fmt: skip


def rows():
    """The cells of each row of the table."""
    lines = [line for line in LIST.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][1:]


def functions_in(path):
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_item_has_a_row_with_tests_or_a_reason():
    assert [row[0] for row in rows()] == ITEMS
    for item, _, tests, figures in rows():
        assert tests != "none" or figures, item


def test_every_test_in_the_list_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", LIST.read_text())
    assert len(named) > 100
    functions = {file: functions_in(TESTS / file) for file in {file for file, _ in named}}
    assert not [f"{file}::{name}" for file, name in named if name not in functions[file]]


def names_in(node):
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name | ast.Attribute):
            yield inner.id if isinstance(inner, ast.Name) else inner.attr


@functools.cache
def expected():
    """Names in ``pytest.raises(...)``, ``pytest.warns(...)``, or anywhere in an ``assert``."""
    found = set()
    for file in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assert):
                found |= set(names_in(node))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                if node.func.attr in ("raises", "warns"):
                    found |= set(names_in(node.args[0]))
    return found


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "MargeqError"])
def test_every_error_and_warning_is_expected_by_some_test(name):
    """Of the base class there are no instances."""
    assert name in expected()
