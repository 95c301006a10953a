"""The table of dialects: each is read into pairs and written from them, so that any can become any other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.convert.base import Base
from veneer.convert.detect import Found, detect
from veneer.convert.dialects import diffusers, kohya, litgpt, mlx, peft, torchtune, vllm
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pairs
from veneer.errors import ConfigError, FormatError, first_few, suggest

READERS: dict[str, ModuleType] = {
    "peft": peft,
    "kohya": kohya,
    "diffusers": diffusers,
    "torchtune": torchtune,
    "mlx": mlx,
    "litgpt": litgpt,
}
WRITERS: dict[str, ModuleType] = {**READERS, "vllm": vllm}


def read(path: str | Path, *, base: Base | None = None, allow: str | Iterable[str] = ()) -> Pairs:
    """The adapter at `path`, a folder or a file of tensors, of whatever dialect.

    base: what the dialect needs to know of the base model. allow: names of tensors and settings that may be left out,
    with * for any text. Raises FormatError for what is not understood, all of one kind together.
    """
    return read_found(detect(Path(path)), base or Base(), allow)


def read_found(found: Found, base: Base, allow: str | Iterable[str] = ()) -> Pairs:
    """The adapter that `detect` found; see `read`."""
    if found.dialect not in READERS:
        raise FormatError(
            f"{found.file} holds changes that are no pairs of factors; they become some with model= and rank= or energy="
        )
    rest = Leftovers(allow)
    pairs: Pairs = READERS[found.dialect].read(found, base, rest)
    pairs = replace(pairs, left_out=(*pairs.left_out, *rest.settle(found.file)))
    check_names(pairs, base)
    return pairs


def check_names(pairs: Pairs, base: Base) -> None:
    """Raises FormatError for sites that are no modules of the base, where its names are known."""
    known = {*base.names, *(f"{part}.{n}" for part in pairs.parts for n in base.names)}
    strange = [n for n in pairs.sites if n not in known]
    if base.names and strange:
        some = first_few(base.names[-3:])
        raise FormatError(
            f"{len(strange)} of {len(pairs.sites)} layers are not in the base model: {first_few(strange)}; it has e.g. {some}"
        )


def write(pairs: Pairs, folder: str | Path, to: str, *, base: Base | None = None) -> list[str]:
    """Writes the adapter into `folder` in the dialect `to`, whole or not at all; what was rounded or added, in words.

    Raises ConfigError for an unknown dialect and a folder that is not empty, FormatError for what the dialect cannot hold.
    """
    if to not in WRITERS:
        raise ConfigError(f"unknown dialect {to!r}{suggest(to, WRITERS)}")
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ConfigError(f"{folder} holds something already; choose another folder or empty it")
    writer: Any = WRITERS[to]
    notes: list[str] = writer.write(pairs, Path(folder), base or Base())
    return notes
