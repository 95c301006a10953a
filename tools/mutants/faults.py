"""Finds the faults that can be planted in a file; a fault is identified by its text, so lines may move."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mutants.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "veneer"
# Nodes without an effect: error messages, checks for the type checker, texts, types.
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
CHECKED = "strict"  # of zip, which never fires in correct code
TYPES = ("annotation", "returns", "decorator_list", "type_params")


class Fault(NamedTuple):
    """A fault in a file.

    file: relative to src/veneer. where: the function. was, becomes: the statement, or the head of a compound
    one. number: index among the faults of the file.
    """

    file: str
    line: int
    where: str
    operator: str
    was: str
    becomes: str
    number: int

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """Returns the parts that stay the same if other lines of the file change."""
        return self.file, self.where, self.operator, self.was, self.becomes

    def __str__(self) -> str:
        return (
            f"src/veneer/{self.file}:{self.line}: {self.operator} in {self.where}\n  - {self.was}\n  +"
            f" {self.becomes}"
        )


class Spot(NamedTuple):
    """A node, its place in the tree (place: index in a list), its statement and its function."""

    node: ast.AST
    parent: ast.AST
    field: str
    place: int | None
    statement: ast.stmt
    where: str

    def put(self, node: ast.AST) -> None:
        """Replaces the node."""
        if self.place is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.place] = node


def of(file: str, source: str) -> list[Fault]:
    """Returns every fault that an operator finds in the source."""
    return [fault for fault, _ in _planted(file, ast.parse(source))]


def plant(source: str, fault: Fault) -> ast.Module:
    """Returns the source with the fault."""
    tree = ast.parse(source)
    for found, planted in _planted(fault.file, tree):
        if found.number == fault.number:
            assert found.key == fault.key, "the file changed since the fault was found"
            return ast.fix_missing_locations(planted)
    raise LookupError(fault)


def _planted(file: str, tree: ast.Module) -> Iterator[tuple[Fault, ast.Module]]:
    """Yields every fault with the tree, which contains the fault until the next one is requested."""
    number, idle = 0, set(map(id, _idle(tree)))
    for spot in (s for s in list(_spots(tree, "", None)) if id(s.node) not in idle):
        for name, operator in OPERATORS.items():
            for node in operator(spot.node):
                was = _text(spot.statement)
                spot.put(node)
                becomes = _text(node if isinstance(node, ast.stmt) else spot.statement)
                if becomes != was:
                    line: int = getattr(spot.node, "lineno", spot.statement.lineno)
                    yield Fault(file, line, spot.where or "the module", name, was, becomes, number), tree
                    number += 1
                spot.put(spot.node)


def _spots(node: ast.AST, where: str, statement: ast.stmt | None) -> Iterator[Spot]:
    """Yields every node below this one that has an effect."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        where = f"{where}.{node.name}".removeprefix(".")
    for field, value in ast.iter_fields(node):
        if field in TYPES:
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_silent(child):
                continue
            own = child if isinstance(child, ast.stmt) else statement
            if own is not None:
                yield Spot(child, node, field, place, own, where)
            yield from _spots(child, where, own)


def _idle(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the default values of arguments that their function never reads, as of a method to override."""
    for function in (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)):
        read = {n.id for line in function.body for n in ast.walk(line) if isinstance(n, ast.Name)}
        given, last = function.args, [*function.args.posonlyargs, *function.args.args]
        pairs = [*zip(last[::-1], given.defaults[::-1], strict=False)]
        for argument, value in (*pairs, *zip(given.kwonlyargs, given.kw_defaults, strict=True)):
            if value is not None and argument.arg not in read:
                yield from ast.walk(value)


def _is_silent(node: ast.AST) -> bool:
    for_types = (
        isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return for_types or isinstance(node, SILENT) or (isinstance(node, ast.keyword) and node.arg == CHECKED)


def _text(statement: ast.stmt) -> str:
    """Returns the statement on one line; of a compound statement only its head."""
    head = copy.copy(statement)
    for block in ("body", "orelse", "finalbody", "handlers", "decorator_list"):
        if getattr(head, block, None):
            setattr(head, block, [ast.Pass()] if block == "body" else [])
    if isinstance(head, ast.Try):
        return "try:"
    return ast.unparse(head).removesuffix("\n    pass")


def sample(faults: Iterable[Fault], area: dict[str, str], seed: int) -> list[Fault]:
    """Returns the faults in drawing order: operators and areas in turn, each sorted by hashes.

    area: {file: area}. An edit of a file changes the order of its own faults only.
    """
    cells: dict[tuple[str, str], list[tuple[str, Fault]]] = defaultdict(list)
    seen: dict[tuple[str, ...], int] = defaultdict(int)
    for fault in faults:
        seen[fault.key] += 1
        cells[(area[fault.file], fault.operator)].append((_hash(seed, *fault.key, seen[fault.key]), fault))
    turns = [
        (turn, _hash(seed, *cell), fault)
        for cell, members in cells.items()
        for turn, (_, fault) in enumerate(sorted(members, key=lambda member: member[0]))
    ]
    return [fault for *_, fault in sorted(turns, key=lambda t: t[:2])]


def _hash(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
