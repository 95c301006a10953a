"""y + (x A') B for rows sorted by adapter; factors are read in place, never copied.

Factors of several adapters lie side by side in stacks A (n, r, in) and B (n, r, out). A run is a stretch of
rows whose adapters are neighbours in a stack, with the same number of rows each: one batched product over
views of the stacks serves all of them. Punica's SGMV (Chen et al. 2023, https://arxiv.org/abs/2310.18547)
computes the same segments in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Consecutive rows of one adapter: its stack, its place in it, the number of rows, its strength."""

    stack: int
    place: int
    rows: int
    strength: float = 1.0


class Run(NamedTuple):
    """`places` adjacent adapters of one stack from `first` on, with `rows` rows each, from row `start` on.

    strengths: (places, 1, 1), or None where all are 1.
    """

    stack: int
    first: int
    places: int
    start: int
    rows: int
    strengths: Tensor | None = None

    @property
    def end(self) -> int:
        """Returns the index after the last row."""
        return self.start + self.places * self.rows

    def of(self, t: Tensor) -> Tensor:
        """Returns the run's rows of t (rows, width) as a view (places, rows, width)."""
        return t[self.start : self.end].view(self.places, self.rows, t.shape[1])


def runs(segments: Iterable[tuple[int, Segment]], like: Tensor) -> list[Run]:
    """Groups segments, each given with its first row, into runs. like: device and dtype of strengths."""
    found: list[list[tuple[int, Segment]]] = []
    for start, s in segments:
        if found and _joins(found[-1][-1], start, s):
            found[-1].append((start, s))
        else:
            found.append([(start, s)])
    return [_run(group, like) for group in found]


def _joins(last: tuple[int, Segment], start: int, s: Segment) -> bool:
    end, before = last[0] + last[1].rows, last[1]
    neighbours = (s.stack, s.place) == (before.stack, before.place + 1)
    return neighbours and start == end and s.rows == before.rows


def _run(group: Sequence[tuple[int, Segment]], like: Tensor) -> Run:
    start, s = group[0]
    strengths = [each.strength for _, each in group]
    scale = None if all(t == 1 for t in strengths) else like.new_tensor(strengths).view(-1, 1, 1)
    return Run(s.stack, s.place, len(group), start, s.rows, scale)


def add(x: Tensor, y: Tensor, A: Tensor, B: Tensor, run: Run) -> None:
    """Adds strength * (x A') B to the run's rows of y in place.

    x: (t, in); y: (t, out), contiguous; A: (n, r, in); B: (n, r, out).
    """
    own = slice(run.first, run.first + run.places)
    h = torch.bmm(run.of(x), A[own].mT)  # (places, rows, r)
    if run.strengths is not None:
        h *= run.strengths
    run.of(y).baddbmm_(h, B[own])


def gain(y: Tensor, excess: Tensor, run: Run, shift: Tensor | None) -> None:
    """Adds strength * (g - 1) * (y - bias) to the run's rows of y in place.  excess: (n, out), g - 1."""
    e, own = excess[run.first : run.first + run.places, None], run.of(y)  # (places, 1, out)
    if run.strengths is not None:
        e = e * run.strengths
    own.addcmul_(e, own if shift is None else own - shift)


def fill(c: Tensor, gains: Tensor, run: Run) -> None:
    """Writes the run's input gains, rows of gains (n, in), into its rows of c (t, in)."""
    run.of(c).copy_(gains[run.first : run.first + run.places, None])
