"""Settings of data: which texts a run names, and how a text is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from veneer.errors import option
from veneer.settings import REQUIRED, Range, Settings, setting

NO_TEXT = "none"  # as `known`: forgetting is not measured


@dataclass(frozen=True, kw_only=True)
class Texts(Settings):
    """The texts of a run, by the part each plays."""

    PANEL = "Data"

    data: tuple[str, ...] = setting(
        REQUIRED,
        "texts to learn from: files (.txt, .jsonl, .csv, .parquet, ..), datasets, builtin:prose;"
        " NAME@2: twice an epoch",
    )
    valid: tuple[str, ...] = setting((), "texts to choose the best step by; a tenth of data unless given")
    test: tuple[str, ...] = setting(
        (), "texts measured before and after training only; results are valid's without them"
    )
    known: tuple[str, ...] = setting(
        (), "texts to measure forgetting on; none: no text; builtin:known for the built-in model"
    )
    stream: bool = setting(
        False, "read data row by row while training, without holding all of it; needs steps"
    )
    buffer: int = setting(1024, "windows of a stream to hold and draw the next one from", unit="windows")

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from Range("1 or more", ("buffer",), 1).problems(self)
        if not self.data:
            data = option("data")
            yield f"{data} must name a text, got none; give files (.txt, .jsonl), builtin:prose or builtin:c"
        if self.buffer != Texts.buffer and not self.stream:
            stream, buffer = option("stream", True), option("buffer")
            yield f"{buffer} {self.buffer} applies to a stream only; set {stream}, or leave {buffer} out"
        if NO_TEXT in self.known and len(self.known) > 1:
            others = ", ".join(k for k in self.known if k != NO_TEXT)
            yield f"{option('known')} must be {NO_TEXT!r} or texts, got both ({others}); give one of them"


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """Rules by which rows become examples; enough to read a text without a run."""

    PANEL = "Data"

    length: int = setting(256, "longest window", unit="tokens")
    packing: bool = setting(True, "put several short texts into one window, hidden from each other")
    train_on: Literal["completion", "all"] = setting(
        "completion", "learn completions and assistant turns, or all of each text"
    )
    train_roles: tuple[str, ...] = setting(("assistant",), "roles of a conversation to learn")
    allow: tuple[str, ...] = setting((), "checks to turn off; truncate: cut rows longer than length")

    @property
    def truncates(self) -> bool:
        """Says that rows longer than `length` are cut, not refused."""
        return "truncate" in self.allow

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from Range("1 or more", ("length",), 1).problems(self)
        if self.train_on == "all" and self.train_roles != Reading.train_roles:
            roles, on = option("train_roles"), option("train_on", "all")
            yield f"{roles} chooses turns, but {on} learns all of them; leave one of them out"
        if not self.train_roles:
            yield f"{option('train_roles')} must name a role, got none; the usual one is assistant"
