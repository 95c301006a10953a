"""Options that a setting holds for a method, an optimiser or a task, checked against a signature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import Parameter
from typing import Any

from veneer import settings
from veneer.errors import suggest


def unsuitable(owner: str, given: Mapping[str, Any], known: Mapping[str, Parameter]) -> Iterator[str]:
    """Yields a sentence for every option that `owner` lacks and every value of another type."""
    for name, value in given.items():
        if name not in known:
            yield f"{owner} has no option {name!r}{suggest(name, known)}"
            continue
        try:
            settings.suit(value, known[name].annotation)
        except ValueError as e:
            yield f"{owner}: {name} {e}"
