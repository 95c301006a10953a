"""Chooses the examples of each step of a stream, in an order that depends on seed and data alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from veneer.ops.draws import keyed

PREFIX = "stream."  # of the stream's tensors in a checkpoint


class Place(NamedTuple):
    """A position in the data: the row, counted from 0, and how many of its pieces have been read.

    seen: a hash of all rows up to this one, or nothing at the beginning of the data.
    """

    row: int = 0
    pieces: int = 0
    seen: bytes = b""


# Yields the pieces from a place on, without end, each with the place after it.
PiecesFrom = Callable[[Place], Iterator[tuple[Place, Any]]]


class Joiner(Protocol):
    """Joins pieces into examples, one at a time. open: the unfinished examples, oldest first."""

    open: list[Any]

    def add(self, piece: Any) -> Any | None:
        """Adds a piece to an example. Returns the example that this finishes, if any."""


class ExampleKind(Protocol):
    """A kind of example: joined from pieces, and stored in a checkpoint as tensors."""

    def joiner(self, still_open: Iterable[Any] = ()) -> Joiner:
        """Returns a joiner with these unfinished examples."""

    def as_tensors(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Returns examples as tensors by name."""

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        """Returns the examples of `as_tensors`; other names may be among them."""


class Stream:
    """Steps of `accumulate` micro-batches of `batch` examples, read as needed.

    Holds `buffer` examples and the unfinished ones. Each example is drawn from the next `buffer` ones,
    which separates neighbours in the data by about that distance.
    """

    def __init__(
        self,
        pieces_from: PiecesFrom,
        kind: ExampleKind,
        batch: int,
        accumulate: int,
        *,
        buffer: int,
        seed: int,
    ) -> None:
        self.pieces_from, self.kind, self.batch, self.accumulate = pieces_from, kind, batch, accumulate
        self.buffer = buffer
        self.draw = keyed(seed, "order of a stream")
        self.made, self.place, self.held, self.joiner = 0, Place(), list[Any](), kind.joiner()
        self._source: Iterator[tuple[Place, Any]] | None = None

    def step(self, step: int) -> list[list[Any]]:
        """Returns the micro-batches of the next step, counted from 0. Raises the errors of reading."""
        if step != self.made:
            raise ValueError(f"a stream's steps must be in order: the next one is {self.made}, got {step}")
        found = [[self._example() for _ in range(self.batch)] for _ in range(self.accumulate)]
        self.made += 1
        return found

    def _example(self) -> Any:
        while len(self.held) <= self.buffer:
            self.held.append(self._read())
        i = int(torch.randint(self.buffer, (), generator=self.draw))
        taken, self.held[i] = self.held[i], self.held.pop()
        return taken

    def _read(self) -> Any:
        self._source = self._source or self.pieces_from(self.place)
        while True:
            self.place, piece = next(self._source)
            example = self.joiner.add(piece)
            if example is not None:
                return example

    def state(self) -> dict[str, Tensor]:
        """Returns all that later steps depend on beside the data. Call it between two steps."""
        counts = torch.tensor([self.made, self.place.row, self.place.pieces, len(self.held)])
        own = {"draw": self.draw.get_state(), "counts": counts}
        if self.place.seen:
            own["seen"] = torch.tensor(list(self.place.seen), dtype=torch.uint8)
        examples = self.kind.as_tensors([*self.held, *self.joiner.open])
        return {f"{PREFIX}{name}": t for name, t in {**own, **examples}.items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `state`; earlier rows are skipped."""
        own = {name.removeprefix(PREFIX): t for name, t in saved.items() if name.startswith(PREFIX)}
        self.draw.set_state(own["draw"])
        self.made, row, pieces, n = own["counts"].tolist()
        examples = self.kind.from_tensors(own)
        seen = bytes(own["seen"].tolist()) if "seen" in own else b""
        self.place, self.held = Place(row, pieces, seen), examples[:n]
        self.joiner = self.kind.joiner(examples[n:])
        self._source = None
