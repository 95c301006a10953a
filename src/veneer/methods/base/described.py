"""What docstrings say of methods, starts, optimisers and their options: help, model cards and documentation
are made of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from veneer.methods import Delta, options_of


class Described(NamedTuple):
    """summary: what it is, with its formula; paper: the address, or None; rest: the paragraphs after the
    first."""

    summary: str
    paper: str | None
    rest: str


def of_doc(doc: str) -> Described:
    """A docstring, whose first paragraph ends with the paper's address where there is a paper."""
    first, _, rest = doc.partition("\n\n")
    text = " ".join(first.split())
    found = re.search(r"https?://\S+", text)
    if found is None:
        return Described(text, None, rest)
    return Described(text[: found.start()].rstrip(" ,."), found.group().rstrip(".,)"), rest)


def of_module(kind: Any) -> Described:
    """What the file says in which a method, start or optimiser stands."""
    return of_doc(inspect.getdoc(inspect.getmodule(kind)) or "")


def option_helps(method: type[Delta]) -> dict[str, str]:
    """What the docstring of a method's __init__ says of its options."""
    return helps_of(method.__init__, options_of(method))


def helps_of(function: Callable[..., Any], names: Collection[str]) -> dict[str, str]:
    """What the `name: text` lines of a docstring say, by name; a text goes on to the next name or an empty
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
