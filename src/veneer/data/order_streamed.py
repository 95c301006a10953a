"""Chooses the windows of each step of a stream, in an order that depends on seed and data alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.pack import Packer, Segment, Window
from veneer.ops.draws import keyed

PREFIX = "stream."  # of the stream's tensors in a checkpoint


class Place(NamedTuple):
    """A position in the data: the row, counted from 0, and how many of its segments have been read."""

    row: int = 0
    segments: int = 0


# Yields the segments from a place on, without end, each with the place after it.
SegmentsFrom = Callable[[Place], Iterator[tuple[Place, Segment]]]


class Stream:
    """Steps of `accumulate` micro-batches of `batch` windows, read as needed.

    Holds `buffer` windows and those still being packed. Each window is drawn from the next `buffer` ones,
    which separates neighbours in the data by about that distance.
    """

    def __init__(
        self,
        segments_from: SegmentsFrom,
        length: int | None,
        batch: int,
        accumulate: int,
        *,
        buffer: int,
        seed: int,
    ) -> None:
        """length: of the packed windows, in tokens; None: without packing."""
        self.segments_from, self.length, self.batch, self.accumulate = (
            segments_from,
            length,
            batch,
            accumulate,
        )
        self.buffer = buffer
        self.draw = keyed(seed, "order of a stream")
        self.made, self.place, self.held, self.packer = 0, Place(), list[Window](), Packer(length or 0)
        self._source: Iterator[tuple[Place, Segment]] | None = None

    def step(self, step: int) -> list[list[Window]]:
        """Returns the micro-batches of the next step, counted from 0. Raises the errors of reading."""
        if step != self.made:
            raise ValueError(f"a stream's steps must be in order: the next one is {self.made}, got {step}")
        found = [[self._window() for _ in range(self.batch)] for _ in range(self.accumulate)]
        self.made += 1
        return found

    def _window(self) -> Window:
        while len(self.held) <= self.buffer:
            self.held.append(self._read())
        i = int(torch.randint(self.buffer, (), generator=self.draw))
        taken, self.held[i] = self.held[i], self.held.pop()
        return taken

    def _read(self) -> Window:
        self._source = self._source or self.segments_from(self.place)
        while True:
            self.place, segment = next(self._source)
            window = (segment,) if self.length is None else self.packer.add(segment)
            if window is not None:
                return window

    def state(self) -> dict[str, Tensor]:
        """Returns all that later steps depend on beside the data. Call it between two steps."""
        counts = torch.tensor([self.made, *self.place, len(self.held)])
        windows = [*self.held, *map(tuple, self.packer.open)]
        return {
            f"{PREFIX}{name}": t
            for name, t in {"draw": self.draw.get_state(), "counts": counts, **_flat(windows)}.items()
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Restores `state`; earlier rows are skipped."""
        own = {name.removeprefix(PREFIX): t for name, t in saved.items() if name.startswith(PREFIX)}
        self.draw.set_state(own["draw"])
        self.made, row, segments, n = own["counts"].tolist()
        windows = _windows(own)
        self.place, self.held, self.packer = (
            Place(row, segments),
            windows[:n],
            Packer(self.length or 0, windows[n:]),
        )
        self._source = None


def _flat(windows: Sequence[Window]) -> dict[str, Tensor]:
    """Returns windows as tensors: fields of all segments end to end (int32), lengths, segments per window."""
    segments = [s for w in windows for s in w]
    empty = torch.zeros(0, dtype=torch.int64)
    fields = {
        name: torch.cat([empty, *(getattr(s, name) for s in segments)]).int() for name in Segment._fields
    }
    return {
        **fields,
        "lengths": torch.tensor([len(s.inputs) for s in segments]),
        "sizes": torch.tensor([len(w) for w in windows]),
    }


def _windows(flat: Mapping[str, Tensor]) -> list[Window]:
    fields = [flat[name].long().split(flat["lengths"].tolist()) for name in Segment._fields]
    segments = iter([Segment(*one) for one in zip(*fields, strict=True)])
    return [tuple(islice(segments, n)) for n in flat["sizes"].tolist()]
