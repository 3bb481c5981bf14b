"""The layout of the package: a module imports only from its own section and the ones above."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import margeq.layers  # noqa: F401  registers the rules
from margeq.curvature.io import registered_types
from tests.layer_cases import LAYER_CASES

PACKAGE = Path(__file__).parent.parent / "margeq"

LAYOUT = [
    [
        "errors",
        "comm",
        "groups",
        "group_distributions",
        "shares",
        "bases",
        "filters",
        "linalg",
        "counts",
        "printable",
    ],
    ["parameters", "paths", "subsets", "curvature", "batches"],
    ["layers"],
    ["likelihoods", "priors"],
    [
        "accumulation",
        "adjoint",
        "pull",
        "reduction",
        "revisit",
        "state",
        "closed_form",
        "data_pass",
        "halving",
        "laplace",
        "output_scales",
        "posterior",
        "predictive",
        "integrations",
        "effective_dim",
        "function_share",
        "pictures",
    ],
    ["optimize", "training", "checkpoint", "distributed", "callbacks", "trackers"],
    ["convert", "models", "data"],
    ["config", "runs"],
    [
        "report",
        "testing",
        "cli",
        "flags",
        "terminal",
        "demo",
        "comparison",
        "__init__",
        "__main__",
    ],
]
SECTION = {part: number for number, parts in enumerate(LAYOUT) for part in parts}
FACES = len(LAYOUT) - 1  # the only section that may import lazily, inside functions


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def section(module: str) -> int:
    """Number of the section of ``margeq.a.b``, which is that of ``a``."""
    part = module.split(".")[1] if "." in module else "__init__"
    assert part in SECTION, f"give {module} a section in LAYOUT"
    return SECTION[part]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST, inside_function: bool = False):
    """All import statements that run, each with whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside_function
        elif not is_type_checking(child):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, inside_function or is_function)


def targets(statement: ast.Import | ast.ImportFrom, module: str) -> set[str]:
    """The margeq modules that an import statement of ``module`` names."""
    if isinstance(statement, ast.Import):
        named = {alias.name for alias in statement.names}
    else:
        base = statement.module or ""
        if statement.level:
            is_package = MODULES[module].name == "__init__.py"
            up = statement.level - is_package
            parents = module.split(".")[: -up or None]
            base = ".".join([*parents, *base.split(".")]).rstrip(".")
        # `from margeq.layers import dense` names a module, `from margeq.errors import E` does not.
        full = {f"{base}.{alias.name}" for alias in statement.names}
        named = {name if name in MODULES else base for name in full}
    return {name for name in named if name.split(".")[0] == "margeq"}


def internal_imports(module: str) -> list[tuple[str, bool]]:
    tree = ast.parse(MODULES[module].read_text())
    found = [(targets(statement, module), lazy) for statement, lazy in imports(tree)]
    return [(target, lazy) for names, lazy in found for target in sorted(names)]


@pytest.mark.parametrize("module", MODULES)
def test_no_import_from_a_section_below(module):
    below = [name for name, _ in internal_imports(module) if section(name) > section(module)]
    assert not below, f"{module} imports {below}"


@pytest.mark.parametrize("module", [name for name in MODULES if section(name) < FACES])
def test_internal_imports_stand_at_the_top(module):
    lazy = [name for name, inside_function in internal_imports(module) if inside_function]
    assert not lazy, f"{module} imports {lazy} inside a function"


@pytest.mark.parametrize("module", MODULES)
def test_no_star_import(module):
    tree = ast.parse(MODULES[module].read_text())
    starred = [s.lineno for s, _ in imports(tree) if any(a.name == "*" for a in s.names)]
    assert not starred


def test_no_import_cycle():
    graph = {m: {name for name, lazy in internal_imports(m) if not lazy} for m in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_every_registered_layer_type_has_a_case():
    # layer types that other tests register are their own business
    ours = {t for t in registered_types() if t.__module__.split(".")[0] in ("margeq", "torch")}
    covered = {type(module) for case in LAYER_CASES for module in case.make().modules()}
    assert ours <= covered, f"add a LayerCase for {ours - covered} to tests/layer_cases.py"
