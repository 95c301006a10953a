"""Tokens into windows: a row's predictions as segments, and several segments in a window, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.tokens import Tokens

IGNORED = -100  # a position whose prediction is not learned, as torch's cross_entropy has it
OPEN = 64  # windows that are still looked at for a place


class Segment(NamedTuple):
    """Predictions in a row of text: inputs (n,) and the token that follows each, labels (n,), IGNORED where it is not
    learned; n_bytes (n,) of the labels."""

    inputs: Tensor
    labels: Tensor
    n_bytes: Tensor


Window = tuple[Segment, ...]


def segments(tokens: Tokens, length: int) -> list[Segment]:
    """A row as segments of at most `length` predictions. Every token but the first is predicted exactly once.

    Stretches without anything to learn are left out.
    """
    labels = torch.where(tokens.learned[1:], tokens.ids[1:], IGNORED)
    whole = Segment(tokens.ids[:-1], labels, tokens.n_bytes[1:] * tokens.learned[1:])
    cut = [Segment(*(t[i : i + length] for t in whole)) for i in range(0, len(labels), length)]
    return [s for s in cut if bool((s.labels != IGNORED).any())]


def pack(found: Iterable[Segment], length: int) -> list[Window]:
    """Segments in windows of at most `length` tokens, each in the first of the last 64 windows with room for it."""
    packer = Packer(length)
    closed = [window for segment in found if (window := packer.add(segment)) is not None]
    return [*closed, *map(tuple, packer.open)]


class Packer:
    """What `pack` does, a segment at a time. open: the windows that something may still be added to, the oldest first."""

    def __init__(self, length: int, still_open: Iterable[Window] = ()) -> None:
        self.length = length
        self.open = [list(window) for window in still_open]
        self._room = [length - n_tokens([window]) for window in still_open]

    def add(self, segment: Segment) -> Window | None:
        """Puts the segment into a window, and gives back the one that this closes, if it does."""
        n = len(segment.inputs)
        place = next((i for i, room in enumerate(self._room) if room >= n), None)
        if place is not None:
            self.open[place].append(segment)
            self._room[place] -= n
            return None
        self.open.append([segment])
        self._room.append(self.length - n)
        if len(self.open) <= OPEN:
            return None
        self._room.pop(0)
        return tuple(self.open.pop(0))


def width(windows: Sequence[Window], widths: Sequence[int] = ()) -> int:
    """Positions in each row of a batch: the longest window's, or the least of `widths` that holds it."""
    longest = max(n_tokens([w]) for w in windows)
    return min((w for w in widths if w >= longest), default=longest)


def collate(windows: Sequence[Window], pad: int, widths: Sequence[int] = ()) -> dict[str, Tensor]:
    """input_ids and labels (b, t), and position_ids (b, t) where a window holds several segments.

    t is their width(): with few widths there are few shapes, so that a compiler meets them all soon.
    Positions begin anew with each segment: that is what transformers makes a block-diagonal mask from. Padding comes
    last, as a segment of its own, so that nothing that is learned can see it, with or without positions.
    """
    t = width(windows, widths)
    input_ids = torch.full((len(windows), t), pad)
    labels = torch.full((len(windows), t), IGNORED)
    positions = torch.zeros(len(windows), t, dtype=torch.int64)
    for row, window in enumerate(windows):
        at = 0
        for s in window:
            end = at + len(s.inputs)
            input_ids[row, at:end], labels[row, at:end], positions[row, at:end] = (
                s.inputs,
                s.labels,
                torch.arange(end - at),
            )
            at = end
        positions[row, at:] = torch.arange(t - at)
    batch = {"input_ids": input_ids, "labels": labels}
    return {**batch, "position_ids": positions} if any(len(w) > 1 for w in windows) else batch


def n_labels(windows: Iterable[Window]) -> int:
    """Learned tokens in the windows."""
    return sum(int((s.labels != IGNORED).sum()) for w in windows for s in w)


def n_tokens(windows: Iterable[Window]) -> int:
    """Tokens read in the windows, padding not counted."""
    return sum(len(s.inputs) for w in windows for s in w)


def n_bytes(windows: Iterable[Window]) -> int:
    """Bytes of text that the learned tokens stand for."""
    return sum(int(s.n_bytes.sum()) for w in windows for s in w)
