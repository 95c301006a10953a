"""Reads the docstrings of methods, starts, optimisers and their options, for help, model cards and
documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from veneer.methods import Delta, options_of


class Described(NamedTuple):
    """summary: the name with its formula; paper: the address, or None; rest: the paragraphs after the
    first."""

    summary: str
    paper: str | None
    rest: str


def of_doc(doc: str) -> Described:
    """Returns the parts of a docstring whose first paragraph may end with a paper's address."""
    first, _, rest = doc.partition("\n\n")
    text = " ".join(first.split())
    found = re.search(r"https?://\S+", text)
    if found is None:
        return Described(text, None, rest)
    return Described(text[: found.start()].rstrip(" ,."), found.group().rstrip(".,)"), rest)


def of_module(kind: Any) -> Described:
    """Returns the docstring of the file that holds a method, start or optimiser."""
    return of_doc(inspect.getdoc(inspect.getmodule(kind)) or "")


def option_helps(method: type[Delta]) -> dict[str, str]:
    """Returns the help texts of a method's options, from the docstring of its __init__."""
    return helps_of(method.__init__, options_of(method))


def helps_of(function: Callable[..., Any], names: Collection[str]) -> dict[str, str]:
    """Returns the texts of the `name: text` lines of a docstring; each extends to the next name or empty
    line."""
    if not names:
        return {}
    parts = re.split(
        rf"^({'|'.join(map(re.escape, names))}): ", inspect.getdoc(function) or "", flags=re.MULTILINE
    )
    return {
        name: " ".join(text.split("\n\n")[0].split())
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
