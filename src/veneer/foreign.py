"""Reads text from elsewhere under limits: JSON by depth, expressions by time; shows control characters."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from veneer.errors import FormatError

DEEPEST = 100  # levels of lists and objects in JSON, and of a YAML text
VALUES = 100_000  # of a YAML text, with aliases written out
SECONDS = 5.0  # for an expression on all names of a model
LONGEST_NAME = 500  # characters, up to which a plain expression takes no time

# C0, DEL and C1, and the marks that turn the direction of what follows; line breaks and tabs stay.
_UNSEEN = [c for c in range(0xA0) if (c < 0x20 or c >= 0x7F) and chr(c) not in "\n\t"]
_TURNS = [0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
PICTURES = {c: 0x2400 + c for c in _UNSEEN if c < 0x20} | {0x7F: 0x2421}
VISIBLE: dict[int, Any] = {c: f"\\x{c:02x}" for c in _UNSEEN} | {c: f"\\u{c:04x}" for c in _TURNS} | PICTURES


def visible(text: str) -> str:
    """Returns the text for a terminal: control characters as pictures, so that none of them acts."""
    return text.translate(VISIBLE)


def loads(text: str) -> Any:
    """Returns the JSON in a text. Raises json.JSONDecodeError, for more than `DEEPEST` levels too."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError(f"nested deeper than {DEEPEST} levels", text, 0) from None
    except ValueError as e:  # whole numbers of thousands of digits
        raise json.JSONDecodeError(str(e).partition(";")[0], text, 0) from None
    if text.count("[") + text.count("{") > DEEPEST and _deep(found):
        raise json.JSONDecodeError(f"nested deeper than {DEEPEST} levels", text, 0)
    return found


def _deep(found: Any) -> bool:
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [
            v
            for one in level
            if isinstance(one, dict | list)
            for v in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True


class Size(NamedTuple):
    """Values of a YAML node and levels of its lists and mappings, itself included."""

    values: int
    levels: int


def check_yaml(node: Any, seen: dict[int, Size | None] | None = None) -> Size:
    """Returns the size of a YAML node, with each alias written out.

    Raises ValueError for more than `VALUES` values or `DEEPEST` levels, and for a node that holds itself.
    """
    seen = {} if seen is None else seen
    if id(node) in seen:
        known = seen[id(node)]
        if known is None:
            raise ValueError("an alias holds itself")
        return known
    seen[id(node)] = None
    holds = isinstance(node.value, list)
    held = node.value if holds else []
    inner = [part for one in held for part in (one if isinstance(one, tuple) else (one,))]
    sizes = [check_yaml(one, seen) for one in inner]
    size = Size(1 + sum(s.values for s in sizes), holds + max((s.levels for s in sizes), default=0))
    if size.values > VALUES:
        raise ValueError(f"its aliases stand for more than {VALUES:,} values")
    if size.levels > DEEPEST:
        raise ValueError("it is nested too deeply")
    seen[id(node)] = size
    return size


def yaml_of(text: str, loader: Any) -> Any:
    """Returns the YAML in a text, read by a class of PyYAML's safe loaders.

    Raises yaml.YAMLError or, for nesting and aliases beyond the limits, ValueError.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        check_yaml(node)
        return reader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        reader.dispose()


# Matches in a process of its own, which can be ended; the answer is that it ended.
_MATCH = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "[re.match(p, n) or re.fullmatch(p, n) for p in patterns for n in names]"
)


def check_expressions(patterns: Iterable[str], names: Iterable[str], where: str) -> None:
    """Raises FormatError for a regular expression that takes too long on one of the names.

    Expressions whose time can grow fast are tried in a process of their own. Malformed ones are left to their
    reader.
    """
    names = tuple(names)
    every = max(map(len, names), default=0) > LONGEST_NAME
    risky = tuple(p for p in dict.fromkeys(patterns) if _compiles(p) and (every or _grows(p)))
    if risky and not _ends(risky, names):
        shown = visible(max(risky, key=len)[:80])
        raise FormatError(
            f"{where}: the expression {shown!r} takes too long on the names of the model"
            f" (over {SECONDS:g} s); name the layers, or write a plainer one"
        )


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


@lru_cache(maxsize=64)
def _ends(patterns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    try:
        subprocess.run(
            [sys.executable, "-S", "-E", "-c", _MATCH],
            input=json.dumps([patterns, names]),
            text=True,
            timeout=SECONDS,
            check=True,
            capture_output=True,
        )
    except (subprocess.SubprocessError, OSError):
        return False
    return True


def _grows(pattern: str) -> bool:
    """Tells if the time of an expression may grow faster than the square of a name's length.

    That takes a repeat of more than one character or class, a back reference, or three open repeats.
    """
    of, parser = _grammar()
    single, repeats, open_repeats = (of.LITERAL, of.NOT_LITERAL, of.ANY, of.IN), _repeats(of), 0
    waiting: list[Any] = [parser.parse(pattern)]
    while waiting:
        for kind, value in waiting.pop():
            if kind in repeats and value[1] > 1:
                body = list(value[2])
                open_repeats += value[1] > 8
                if len(body) != 1 or body[0][0] not in single:
                    return True
            elif kind in (of.GROUPREF, of.GROUPREF_EXISTS) or open_repeats > 2:
                return True
            waiting += _inner(value)
    return open_repeats > 2


def _grammar() -> tuple[Any, Any]:
    """Returns the constants and the parser of regular expressions, which Python 3.11 renamed."""
    old = sys.version_info < (3, 11)
    names = ("sre_constants", "sre_parse") if old else ("re._constants", "re._parser")
    constants, parser = (importlib.import_module(name) for name in names)
    return constants, parser


def _repeats(of: Any) -> tuple[Any, ...]:
    found = (getattr(of, name, None) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"))
    return tuple(kind for kind in found if kind is not None)


def _inner(value: Any) -> list[Any]:
    """Returns the parts of an expression that a step of it holds."""
    if type(value).__name__ == "SubPattern":
        return [value]
    if isinstance(value, list | tuple):
        return [part for one in value for part in _inner(one)]
    return []
