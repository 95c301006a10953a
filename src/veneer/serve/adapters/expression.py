"""Adapter expressions: `french@0.75+formal@-0.3` as names with strengths."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from veneer.serve.errors import RequestError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
STRENGTH = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
LARGEST, MEMBERS = 4.0, 8
Named = tuple[tuple[str, float], ...]


def parse(text: str, known: Collection[str], base: str) -> Named:
    """Returns the adapters of a model field: () for the base; an exact name wins over an expression.

    Raises RequestError for a text that cannot be read. Unknown names are returned as they stand.
    """
    if text in ("", base):
        return ()
    if text in known or not set(text) & set("@+"):
        return ((text, 1.0),)
    return summed([_part(part, text) for part in _split(text)], base, "model")


def _split(text: str) -> list[str]:
    """The parts between plus signs; a plus right after @ belongs to the strength."""
    return re.split(r"(?<!@)\+", text)


def _part(part: str, text: str) -> tuple[str, float]:
    name, at, strength = part.partition("@")
    if not NAME.fullmatch(name) or (at and not STRENGTH.fullmatch(strength)):
        raise RequestError(
            f"model: {text!r} must be NAME[@STRENGTH][+NAME[@STRENGTH]].., such as french@0.75+formal@-0.3;"
            f" {part!r} cannot be read",
            code="invalid_mixture",
            param="model",
        )
    return name, float(strength) if at else 1.0


def of_list(entries: Sequence[Any], numbered: Sequence[str], base: str) -> Named:
    """Returns the adapters of a `lora` field: objects with "id" (a name, or a number into `numbered`) or
    "name", and "scale".

    Raises RequestError for entries that cannot be read. A missing scale counts 0, as in llama.cpp.
    """
    found = []
    for entry in entries:
        key = entry.get("name", entry.get("id")) if isinstance(entry, dict) else None
        scale = entry.get("scale", 0.0) if isinstance(entry, dict) else None
        if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(numbered):
            key = numbered[key]
        if not isinstance(key, str) or isinstance(scale, bool) or not isinstance(scale, int | float):
            raise RequestError(
                f'lora must be a list of {{"id": NAME, "scale": NUMBER}}, got the entry {entry!r};'
                f" adapter numbers go from 0 to {len(numbered) - 1}",
                code="invalid_mixture",
                param="lora",
            )
        found.append((key, float(scale)))
    return summed(found, base, "lora")


def summed(parts: Sequence[tuple[str, float]], base: str, param: str) -> Named:
    """Returns the parts with equal names added up, without the base and without strength 0.

    Raises RequestError for strengths beyond LARGEST and for more than MEMBERS parts.
    """
    total: dict[str, float] = {}
    for name, strength in parts:
        total[name] = total.get(name, 0.0) + strength
    wild = {n: s for n, s in total.items() if not (math.isfinite(s) and abs(s) <= LARGEST)}
    if wild:
        raise RequestError(
            f"{param}: strengths must be from -{LARGEST:g} to {LARGEST:g}, got {wild}",
            code="invalid_mixture",
            param=param,
        )
    if len(total) > MEMBERS:
        raise RequestError(
            f"{param}: a sum must have at most {MEMBERS} adapters, got {len(total)}",
            code="invalid_mixture",
            param=param,
        )
    return tuple((n, s) for n, s in total.items() if n not in ("", base) and s != 0)
