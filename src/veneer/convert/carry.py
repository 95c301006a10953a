"""Reads any dialect into pairs and writes pairs in any dialect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.convert.base import Base
from veneer.convert.detect import Found, detect
from veneer.convert.dialects import diffusers, gguf, kohya, litgpt, mlx, peft, torchtune, vllm
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pairs, of_pipeline
from veneer.errors import ConfigError, FormatError, first_few, suggest

READERS: dict[str, ModuleType] = {
    "peft": peft,
    "kohya": kohya,
    "diffusers": diffusers,
    "torchtune": torchtune,
    "mlx": mlx,
    "litgpt": litgpt,
}
WRITERS: dict[str, ModuleType] = {**READERS, "vllm": vllm, "gguf": gguf}


@dataclass(frozen=True)
class Conversion:
    """A conversion. notes: roundings, paddings and cuts; left_out: parts missing from the result."""

    source: str
    dialect: str
    to: str
    out: str
    layers: int
    ranks: list[int]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def read(path: str | Path, *, base: Base | None = None, allow: str | Iterable[str] = ()) -> Pairs:
    """Returns the adapter at `path`, a folder or a file of tensors; the dialect is detected.

    base: names and sizes of the base model, which some dialects need. allow: names of tensors and settings
    that may be dropped; * matches any text. Raises FormatError for unsupported content, all problems of one
    kind together.
    """
    return read_found(detect(Path(path)), base or Base(), allow)


def read_found(found: Found, base: Base, allow: str | Iterable[str] = ()) -> Pairs:
    """Returns the adapter that `detect` found; see `read`."""
    if found.dialect not in READERS:
        raise FormatError(
            f"{found.file} holds changes that are not pairs of factors; give model= and rank= or energy= to"
            " factor them"
        )
    rest = Leftovers(allow)
    pairs: Pairs = READERS[found.dialect].read(found, base, rest)
    pairs = replace(pairs, left_out=(*pairs.left_out, *rest.settle(found.file)))
    check_names(pairs, base)
    return pairs


def check_names(pairs: Pairs, base: Base) -> None:
    """Raises FormatError for sites that are not modules of the base; skipped if its names are unknown."""
    known = {*base.names, *(f"{part}.{n}" for part in pairs.parts for n in base.names)}
    strange = [n for n in pairs.sites if n not in known]
    if base.names and strange:
        some = first_few(base.names[-3:])
        raise FormatError(
            f"{len(strange)} of {len(pairs.sites)} layers are missing in the base model:"
            f" {first_few(strange)};"
            f" it has e.g. {some}; give the model that the adapter was trained on"
        )


def write(pairs: Pairs, folder: str | Path, to: str, *, base: Base | None = None) -> list[str]:
    """Writes the adapter into `folder` in the dialect `to`, completely or not at all.

    Returns sentences about values that were rounded or added. Raises ConfigError for an unknown dialect and
    for a folder that is not empty, FormatError for changes that the dialect cannot hold.
    """
    if to not in WRITERS:
        raise ConfigError(f"unknown dialect {to!r}{suggest(to, WRITERS)}")
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ConfigError(f"{folder} is not empty; choose another folder or empty it")
    writer: Any = WRITERS[to]
    base, ready = base or Base(), of_pipeline(pairs)
    if to == "peft" and {*ready.sites} <= {*base.names}:
        ready = replace(
            ready, parts=()
        )  # the base is a pipeline as one model, whose layers are named by part
    notes: list[str] = writer.write(ready, Path(folder), base)
    return notes
