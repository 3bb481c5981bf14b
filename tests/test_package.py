"""Promises of the package as a whole: quick to import, and nothing dangerous inside."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "margeq"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_NAMES = {"exit", "quit", "eval", "exec", "breakpoint"}
FORBIDDEN_CALLS = {"sys.exit", "os._exit", "torch.load", "yaml.load"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Non-full backward hooks give wrong gradients silently; their warning is ignored for asdfghjkl.
FORBIDDEN_METHODS = {"register_backward_hook"}
ALLOWED_IN_CLI = {"print", "sys.exit"}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def least_cpu_seconds(before: str, measured: str, cache: Path) -> float:
    """CPU time of ``measured`` after ``before``, the least of five fresh processes.

    CPU time, because the clock on the wall also counts whatever else the machine is doing; the
    least, because a busy machine makes processors slower too. Byte code lies in ``cache``, as it
    does beside an installed package, also where the checkout or the environment forbids it.
    """
    code = (
        f"import sys, time; {before}; "
        f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(cache)!r}; "
        f"start = time.process_time(); {measured}; print(time.process_time() - start)"
    )
    run_python("-c", code)  # byte-compiles, fills the file cache
    return min(float(run_python("-c", code).stdout) for _ in range(5))


@pytest.mark.parametrize("statement", ["import margeq", "from margeq import optimize_marglik"])
def test_import_adds_at_most_three_tenths_of_a_second_to_torch(statement, tmp_path):
    assert least_cpu_seconds("import torch", statement, tmp_path) <= 0.3


HELP = (
    "import sys; sys.argv = ['margeq', '--help']\n"
    "from margeq.cli import main\n"
    "try: code = main()\n"
    "except SystemExit as end: code = end.code\n"
    "sys.exit(code or 0)"
)


def test_help_does_not_import_torch():
    done = run_python("-X", "importtime", "-c", HELP)
    assert "demo" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "margeq" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "scipy", "matplotlib", "laplace"})


def test_help_takes_at_most_six_tenths_of_a_second():
    resource = pytest.importorskip("resource")  # not on Windows

    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python("-c", HELP)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cpu_seconds()
    assert statistics.median(cpu_seconds() for _ in range(3)) <= 0.6


def is_cli(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py") == "cli"


def forbidden_uses(tree: ast.AST) -> list[tuple[str, int]]:
    """What must not be called or imported, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [(m, node.lineno) for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            method = name.rsplit(".", 1)[-1]
            forbidden = name in FORBIDDEN_NAMES | FORBIDDEN_CALLS | {"print"}
            if forbidden or method in FORBIDDEN_METHODS:
                found.append((name, node.lineno))
            if name in {"np.load", "numpy.load"} and "allow_pickle=False" not in ast.unparse(node):
                found.append((name, node.lineno))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_library_neither_exits_prints_nor_unpickles(path):
    allowed = ALLOWED_IN_CLI if is_cli(path) else set()
    uses = [use for use in forbidden_uses(ast.parse(path.read_text())) if use[0] not in allowed]
    assert not uses


def test_the_search_for_forbidden_uses_finds_them():
    code = (
        "import pickle\nexit()\nprint(1)\ntorch.load(f)\n"
        "model.eval()\nnp.load(f)\nm.register_backward_hook(h)\n"
    )
    names = [name for name, _ in forbidden_uses(ast.parse(code))]
    expected = ["pickle", "exit", "print", "torch.load", "np.load", "m.register_backward_hook"]
    assert sorted(names) == sorted(expected)


def test_no_requirement_is_the_unrelated_package_asdl():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(r for extra in extras for r in extra)]
    pinned = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    names = {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in [*requirements, *pinned]}
    assert "asdfghjkl" in names
    assert "asdl" not in names


def test_package_data_is_complete():
    for name in (
        "py.typed",
        "data/digits.npz",
        "data/LICENSE-digits.txt",
        "report/templates/report.html",
    ):
        assert (PACKAGE / name).exists()
