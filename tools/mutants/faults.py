"""The faults that a file may have, each known by its text, so that edits elsewhere in the file leave it as it is."""

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
# What has no effect of its own: messages of errors, checks for the type checker, texts, types.
SILENT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
CHECKED = "strict"  # of zip, which in code without faults never fires
TYPES = ("annotation", "returns", "decorator_list", "type_params")


class Fault(NamedTuple):
    """file: under src/veneer; where: the function; was, becomes: the statement, or the head of one that holds others.

    number: among the faults of its file.
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
        """What stays when other lines of the file change."""
        return self.file, self.where, self.operator, self.was, self.becomes

    def __str__(self) -> str:
        return f"src/veneer/{self.file}:{self.line}: {self.operator} in {self.where}\n  - {self.was}\n  + {self.becomes}"


class Spot(NamedTuple):
    """A node, where it hangs in the tree (place: in a list), and the statement and the function that it is in."""

    node: ast.AST
    parent: ast.AST
    field: str
    place: int | None
    statement: ast.stmt
    where: str

    def put(self, node: ast.AST) -> None:
        """Hangs another node there."""
        if self.place is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.place] = node


def of(file: str, source: str) -> list[Fault]:
    """Every fault that an operator finds in the source."""
    return [fault for fault, _ in _planted(file, ast.parse(source))]


def plant(source: str, fault: Fault) -> ast.Module:
    """The source with the fault in it."""
    tree = ast.parse(source)
    for found, planted in _planted(fault.file, tree):
        if found.number == fault.number:
            assert found.key == fault.key, "the file is not the one that the fault was found in"
            return ast.fix_missing_locations(planted)
    raise LookupError(fault)


def _planted(file: str, tree: ast.Module) -> Iterator[tuple[Fault, ast.Module]]:
    """Every fault with the tree, which has it until the next one is asked for."""
    number = 0
    for spot in list(_spots(tree, "", None)):
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
    """Every node below this one that does something."""
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


def _is_silent(node: ast.AST) -> bool:
    for_types = (
        isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    return for_types or isinstance(node, SILENT) or (isinstance(node, ast.keyword) and node.arg == CHECKED)


def _text(statement: ast.stmt) -> str:
    """The statement on one line; of one that holds others only its head."""
    head = copy.copy(statement)
    for block in ("body", "orelse", "finalbody", "handlers", "decorator_list"):
        if getattr(head, block, None):
            setattr(head, block, [ast.Pass()] if block == "body" else [])
    if isinstance(head, ast.Try):
        return "try:"
    return ast.unparse(head).removesuffix("\n    pass")


def sample(faults: Iterable[Fault], area: dict[str, str], seed: int) -> list[Fault]:
    """All of them in the order in which they are drawn: every operator in every area in turn, each by the hash of its text.

    area: by file. An edit adds and takes away its own faults, and leaves the order of the others in their cell as it is.
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
