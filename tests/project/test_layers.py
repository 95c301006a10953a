"""Imports point downwards, and optional packages are imported only in functions that use them."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import veneer

ROOT = Path(veneer.__file__).parent
# From the ground up; within a row no one imports another.
ROWS = [
    ("errors",),
    ("foreign", "disk"),
    ("registry", "files", "settings", "version", "dtypes", "units", "network", "signals", "launcher"),
    ("ops",),
    ("sites",),
    ("methods",),
    ("adapt",),
    ("data", "optim", "convert"),
    ("tasks",),
    ("compress", "train", "integrations"),
    ("analyse", "embedded"),
    ("models",),
    ("runs",),
    ("search", "serve"),
    ("verbs",),
    ("cli",),
    ("__init__", "__main__"),
]
HEIGHT = {name: height for height, row in enumerate(ROWS) for name in row}
NEEDED = {"torch", "safetensors"}
# Packages of the optional extras that a layer may name at the top of a file: cli is loaded by the command
# line alone, and the files of serve by a server alone (`import veneer.serve` loads none of them, see
# tests/serve/test_imports.py).
AT_THE_TOP = {
    "cli": {"typer", "rich"},
    "serve": {
        "transformers",
        "fastapi",
        "starlette",
        "pydantic",
        "prometheus_client",
        "sse_starlette",
        "uvicorn",
    },
}
KERNELS = {"ops/fused/kernel.py": {"triton"}}  # imported by functions alone
MAY_USE_TRANSFORMERS = {"data", "tasks", "train", "embedded", "models", "runs", "search", "serve", "verbs"}
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))


def top(file: str) -> str:
    """ "adapt/merge.py" -> "adapt", "errors.py" -> "errors"."""
    return Path(file).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, inside: bool) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of imports; inside=False skips imports in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif inside or not (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or only_for_types(node)):
            yield from imports(node, inside=inside)


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def upward(file: str, tree: ast.AST) -> list[str]:
    """Returns the imports of the own package that point upwards."""
    own, problems = top(file), []
    for line, name in imports(tree, inside=True):
        parts = name.split(".")
        if parts[0] != "veneer" or name == "veneer":
            continue
        other = parts[1]
        if other not in HEIGHT:
            problems.append(f"{file}:{line}: {name} is in no row of ROWS")
        elif other != own and HEIGHT[other] >= HEIGHT[own]:
            problems.append(f"{file}:{line}: {own} must not import {other}, which is not below it")
    return problems


def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downwards(file):
    assert top(file) in HEIGHT, f"{file} is in no row of ROWS"
    assert upward(file, parsed(file)) == []


def needed(file: str) -> set[str]:
    """Returns the package's files that are imported with this one, without the folders on the way."""
    parts = [
        name.split(".")[1:]
        for _, name in imports(parsed(file), inside=False)
        if name.split(".")[0] == "veneer"
    ]
    tries = {
        "/".join(p[:n]) + end for p in parts for n in range(1, len(p) + 1) for end in (".py", "/__init__.py")
    }
    return {
        t for t in tries if t in FILES and t != file and not file.startswith(t.removesuffix("__init__.py"))
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every file that needs itself, by the shortest way back to it."""
    found = []
    for start in graph:
        ways = [[start, other] for other in graph[start]]
        seen = set(graph[start])
        for way in ways:
            if way[-1] == start:
                found.append(way)
                break
            ways += [[*way, other] for other in sorted(graph.get(way[-1], set()) - seen)]
            seen |= graph.get(way[-1], set())
    return found


def test_no_file_needs_itself():
    assert circles({file: needed(file) for file in FILES}) == []


def test_the_search_for_circles_sees_one():
    found = circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()})
    assert found == [["a", "b", "c", "a"], ["b", "c", "a", "b"], ["c", "a", "b", "c"]]


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_imported_inside_functions(file):
    allowed = (
        NEEDED | {"veneer", "__future__"} | set(sys.stdlib_module_names) | AT_THE_TOP.get(top(file), set())
    ) | KERNELS.get(file, set())
    early = [
        f"{file}:{line}: {name}"
        for line, name in imports(parsed(file), inside=False)
        if name.split(".")[0] not in allowed
    ]
    assert early == []


@pytest.mark.parametrize("file", FILES)
def test_transformers_stays_in_its_layers(file):
    if top(file) not in MAY_USE_TRANSFORMERS and file != "methods/prefix.py":
        assert [n for _, n in imports(parsed(file), inside=True) if n.split(".")[0] == "transformers"] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/matrix/linalg.py", "from veneer.sites import Site"),
        ("sites/base.py", "def f():\n    from veneer import methods"),
        ("data/row_files.py", "import veneer.tasks.causal_lm"),
        ("train/loop/loop.py", "from veneer.embedded.texts import library"),
        ("adapt/store/store.py", "from veneer import attach"),
    ],
)
def test_the_check_sees_what_points_upwards(file, source):
    assert len(upward(file, ast.parse(source))) == 1


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone."""
    names = Counter(path.name for path in (Path(__file__).parents[1]).rglob("test_*.py"))
    assert [name for name, n in names.items() if n > 1] == []
