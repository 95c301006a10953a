"""The work of a batch at every layer, by rows that lie sorted by adapter; prepared once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from veneer.adapt.banks.stacks import Placed
from veneer.ops.fused.product import Plan, plan
from veneer.ops.segmented import Run, Segment, runs

Terms: TypeAlias = "tuple[tuple[Placed, float], ...]"  # a sum of adapters with strengths; () is the base


class Apart(NamedTuple):
    """A term that is computed by itself, for the rows from `start` on.

    whole: its low-rank part too, because it reads another input than the layer's; gain: its gain of outputs
    too.
    """

    placed: Placed
    strength: float
    start: int
    rows: int
    whole: bool
    gain: bool


class Program:
    """The work of all layers for rows that lie sorted by their first adapter.

    pairs: low-rank parts of each row's first term; more: those of further terms, with the rows they belong
    to; gains: gains of outputs where a row has one term; scales: gains of inputs where a row has one term at
    strength 1; apart: all else.
    """

    def __init__(self, rows: Sequence[tuple[Terms, int]], like: Tensor) -> None:
        """rows: (adapters, number of consecutive rows) in their order. like: device and dtype of the
        strengths.
        """
        self.rows, self.given = sum(n for _, n in rows), list(rows)
        self.device = like.device
        starts = [0]
        for _, n in rows:
            starts.append(starts[-1] + n)
        spans = [(terms, start, n) for (terms, n), start in zip(rows, starts, strict=False) if n]
        self.apart = [a for terms, start, n in spans for a in _apart(terms, start, n)]
        alone = [
            (placed, start, _segment(placed, strength, n))
            for terms, start, n in spans
            if len(terms) == 1 and not _is_scaled_apart(terms)
            for placed, strength in terms
        ]
        self.gains = runs([(start, s) for placed, start, s in alone if placed.gains], like)
        self.scales = runs([(start, s) for placed, start, s in alone if placed.scales], like)
        levels = _levels(spans)
        self.pairs = runs(levels[0] if levels else (), like)
        self.more = [_gathered(level, like) for level in levels[1:]]

    def groups(self, device: torch.device) -> list[tuple[Terms, Tensor | None]]:
        """Returns the different sums of adapters, each with its rows, or with None for all."""
        places: dict[Terms, list[Tensor]] = {}
        start = 0
        for terms, n in self.given:
            places.setdefault(terms, []).append(torch.arange(start, start + n, device=device))
            start += n
        if len(places) == 1:
            return [(terms, None) for terms in places]
        return [(terms, torch.cat(index)) for terms, index in places.items()]

    @property
    def is_plain(self) -> bool:
        """True if every row has one adapter's low-rank part at most, and nothing else."""
        return bool(self.pairs) and not (self.more or self.gains or self.scales or self.apart)

    @cached_property
    def segments(self) -> list[tuple[int, Segment]]:
        """The adapter of each stretch of rows with its first row, for a plain program."""
        found, start = [], 0
        for terms, n in self.given:
            found += [(start, _segment(placed, strength, n)) for placed, strength in terms if n]
            start += n
        return found

    @cached_property
    def plan(self) -> Plan:
        """The blocks of rows of a plain program."""
        return plan(self.segments, self.rows, self.device)

    @property
    def is_idle(self) -> bool:
        """True if no row has an adapter."""
        return not (self.pairs or self.apart)


def _segment(placed: Placed, strength: float, rows: int) -> Segment:
    return Segment(placed.stack, placed.place, rows, strength)


def _is_scaled_apart(terms: Terms) -> bool:
    """True if a term with input gains cannot be given a scaled input, because other terms read it too."""
    return any(p.scales for p, _ in terms) and [strength for _, strength in terms] != [1.0]


def _apart(terms: Terms, start: int, rows: int) -> list[Apart]:
    found = []
    for placed, strength in terms:
        whole = placed.scales and _is_scaled_apart(terms)
        if whole or placed.multiplies or (placed.gains and len(terms) > 1):
            found.append(Apart(placed, strength, start, rows, whole, whole or len(terms) > 1))
    return found


def _levels(spans: Sequence[tuple[Terms, int, int]]) -> list[list[tuple[int, Segment]]]:
    """The k-th low-rank term of every row, for each k."""
    levels: list[list[tuple[int, Segment]]] = []
    for terms, start, rows in spans:
        whole = _is_scaled_apart(terms)
        plain = [(p, t) for p, t in terms if not (p.scales and whole)]
        for k, (placed, strength) in enumerate(plain):
            if k == len(levels):
                levels.append([])
            levels[k].append((start, _segment(placed, strength, rows)))
    return levels


def _gathered(level: list[tuple[int, Segment]], like: Tensor) -> tuple[Tensor, list[Run]]:
    """The rows of a level sorted by adapter, and the runs among them."""
    level = sorted(level, key=lambda entry: (entry[1].stack, entry[1].place))
    index: list[int] = []
    moved = []
    for start, s in level:
        moved.append((len(index), s))
        index += range(start, start + s.rows)
    return torch.tensor(index, dtype=torch.long, device=like.device), runs(moved, like)
