"""Measures how much a test's text has in common with the faulty function, so that near tests run first."""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from mutants.faults import ROOT, SOURCE

TESTS = ROOT / "tests"


def of_file(file: str, where: str, test_file: str) -> float:
    """Returns the words that a function and a test file share, rare ones above all, by the file's length."""
    own = words_of_tests()[test_file]
    return rare(words_of(file, where) & own) / math.sqrt(1 + len(own))


def of_test(file: str, where: str, test: Callable[..., Any]) -> float:
    """Returns the words that a function and one test share, rare ones above all."""
    return rare(words_of(file, where) & _words(_text(inspect.unwrap(test))))


def rare(words: Iterable[str]) -> float:
    """Returns the number of words, each divided by the number of test files that have it."""
    return sum(1 / max(1, _files_with().get(word, 0)) for word in words)


@functools.cache
def words_of(file: str, where: str) -> frozenset[str]:
    """Returns the words of a function, and the names that its module defines."""
    path = SOURCE / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    names = {path.stem, *(n.name for n in defined)} - {"__init__"}
    inside = [n for n in defined if n.name == where.rpartition(".")[2]]
    return frozenset(names).union(*(_words(ast.unparse(n)) for n in inside))


@functools.cache
def words_of_tests() -> dict[str, frozenset[str]]:
    """Returns {test file: its words}."""
    return {
        p.relative_to(ROOT).as_posix(): _words(p.read_text(encoding="utf-8"))
        for p in TESTS.rglob("test_*.py")
    }


@functools.cache
def _files_with() -> dict[str, int]:
    found: dict[str, int] = {}
    for words in words_of_tests().values():
        for word in words:
            found[word] = found.get(word, 0) + 1
    return found


@functools.cache
def _text(test: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(test)
    except (OSError, TypeError):
        return ""


def _words(text: str) -> frozenset[str]:
    return frozenset(w for w in re.findall(r"[^\W\d_]\w+", text) if len(w) > 3)
