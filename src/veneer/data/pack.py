"""Packs tokens: a row becomes segments, and several segments share a window without seeing each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.data.tokens import Tokens

IGNORED = -100  # the label of a position without a loss, as in torch's cross_entropy
OPEN = 64  # unfinished windows that are searched for room


class Segment(NamedTuple):
    """Predictions in a row: inputs (n,); labels (n,), the next tokens, IGNORED without a loss; n_bytes (n,).

    n_bytes counts the UTF-8 bytes of the labels.
    """

    inputs: Tensor
    labels: Tensor
    n_bytes: Tensor


Window = tuple[Segment, ...]


def segments(tokens: Tokens, length: int) -> list[Segment]:
    """Returns a row as segments of at most `length` predictions; each token but the first is predicted once.

    Segments without a label are left out.
    """
    labels = torch.where(tokens.learned[1:], tokens.ids[1:], IGNORED)
    whole = Segment(tokens.ids[:-1], labels, tokens.n_bytes[1:] * tokens.learned[1:])
    cut = [Segment(*(t[i : i + length] for t in whole)) for i in range(0, len(labels), length)]
    return [s for s in cut if bool((s.labels != IGNORED).any())]


def pack(found: Iterable[Segment], length: int) -> list[Window]:
    """Packs segments into windows of at most `length` tokens: first fit over the last 64 windows."""
    packer = Packer(length)
    closed = [window for segment in found if (window := packer.add(segment)) is not None]
    return [*closed, *map(tuple, packer.open)]


class Packer:
    """Packs one segment at a time, as `pack` does. open: the unfinished windows, oldest first."""

    def __init__(self, length: int, still_open: Iterable[Window] = ()) -> None:
        self.length = length
        self.open = [list(window) for window in still_open]
        self._room = [length - n_tokens([window]) for window in still_open]

    def add(self, segment: Segment) -> Window | None:
        """Adds the segment to a window. Returns the window that this closes, if any."""
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
    """Returns the batch's length: the longest window's, or the smallest of `widths` that holds it."""
    longest = max(n_tokens([w]) for w in windows)
    return min((w for w in widths if w >= longest), default=longest)


def collate(windows: Sequence[Window], pad: int, widths: Sequence[int] = ()) -> dict[str, Tensor]:
    """Returns input_ids and labels (b, t), and position_ids (b, t) if a window holds several segments.

    t is width(windows, widths): few widths mean few shapes to compile. Positions restart with each segment;
    transformers builds a block-diagonal mask from them. Padding comes last, as a segment no label sees.
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
    """Counts the labels in the windows."""
    return sum(int((s.labels != IGNORED).sum()) for w in windows for s in w)


def n_tokens(windows: Iterable[Window]) -> int:
    """Counts the tokens in the windows, without padding."""
    return sum(len(s.inputs) for w in windows for s in w)


def n_bytes(windows: Iterable[Window]) -> int:
    """Counts the UTF-8 bytes of the labels."""
    return sum(int(s.n_bytes.sum()) for w in windows for s in w)
