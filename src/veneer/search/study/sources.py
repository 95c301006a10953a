"""Instructions with exact answers: a Python expression, and its syntax tree as `ast.dump` writes it."""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from veneer.files import replacing

ROWS = {"train": 2000, "valid": 100, "test": 100}
NAMES = "a b c x y n i key row item total count name value".split()
BINARY, COMPARED = ("+", "-", "*", "/", "%"), ("<", ">", "==", "!=")


class Asked(NamedTuple):
    """One instruction with its only right answer."""

    prompt: str
    completion: str


def asked(source: str) -> Asked:
    """Returns the instruction of an expression. Raises SyntaxError for another text."""
    return Asked(f"{source}\nast: ", ast.dump(ast.parse(source, mode="eval").body))


def rows(seed: int = 0) -> dict[str, list[Asked]]:
    """Returns the instructions of each part; no expression is in two of them."""
    draw, seen = random.Random(seed), dict[str, None]()
    while len(seen) < sum(ROWS.values()):
        seen[_expression(draw)] = None
    every = iter(map(asked, seen))
    return {part: [next(every) for _ in range(n)] for part, n in ROWS.items()}


def write(folder: Path, parts: Mapping[str, list[Asked]]) -> dict[str, str]:
    """Writes a file of rows for each part and returns their names by part."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {part: folder / f"{part}.jsonl" for part in parts}
    with replacing(*files.values()) as temporary:
        for own, path in zip(parts.values(), temporary, strict=True):
            path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in own), encoding="utf-8")
    return {part: str(file) for part, file in files.items()}


def _expression(draw: random.Random) -> str:
    left, right = _atom(draw), _atom(draw)
    kind = draw.choice(("binary", "compare", "call", "attribute", "index", "not"))
    return {
        "binary": f"{left} {draw.choice(BINARY)} {right}",
        "compare": f"{left} {draw.choice(COMPARED)} {right}",
        "call": f"{draw.choice(NAMES)}({left})",
        "attribute": f"{draw.choice(NAMES)}.{draw.choice(NAMES)}",
        "index": f"{draw.choice(NAMES)}[{right}]",
        "not": f"not {left}",
    }[kind]


def _atom(draw: random.Random) -> str:
    return draw.choice(NAMES) if draw.random() < 0.7 else str(draw.randrange(100))
