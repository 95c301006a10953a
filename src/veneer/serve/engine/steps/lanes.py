"""Keys and values of running requests: one private strip while a prompt is read, then a row of a lane.

Rows of a lane have nearly one length, within a factor of two, and lie side by side without holes: attention
of all of them is one call on a view, and nothing is copied in a step. A row that outgrows its lane moves to
the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST = 64


def capacity(length: int) -> int:
    """Returns the lane for a length in tokens: the next power of two, at least SHORTEST."""
    return max(SHORTEST, 1 << max(length - 1, 0).bit_length())


class Pair(NamedTuple):
    """Keys and values of one layer, (rows, heads, tokens, head_dim) each."""

    K: Tensor
    V: Tensor


class Strip:
    """Keys and values of one sequence by layer, (1, heads, capacity, head_dim), made as the layers are first
    called.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = capacity(tokens)
        self.layers: dict[int, Pair] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, at: int) -> None:
        """Writes keys and values of consecutive tokens from position `at` on.  k, v: (heads, n, head_dim)."""
        if layer not in self.layers:
            self.layers[layer] = Pair(*(t.new_zeros(1, t.shape[0], self.tokens, t.shape[2]) for t in (k, v)))
        K, V = self.layers[layer]
        n = k.shape[1]
        K[0, :, at : at + n] = k
        V[0, :, at : at + n] = v


class Lane:
    """Rows of equal capacity, of which the first len(owners) are in use."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.owners: list[object] = []
        self.lengths: list[int] = []
        self.layers: dict[int, Pair] = {}
        self.rows = 0  # that the tensors have

    def enter(self, owner: object, length: int, source: Callable[[int], Pair], layers: list[int]) -> None:
        """Adds a row.  source: keys and values (1, heads, >= length, head_dim) of a layer, by the layer's
        number.
        """
        if len(self.owners) == self.rows:
            self._grow(source, layers)
        row = len(self.owners)
        for layer in layers:
            for into, own in zip(self.layers[layer], source(layer), strict=True):
                into[row, :, :length] = own[0, :, :length]
        self.owners.append(owner)
        self.lengths.append(length)

    def _grow(self, source: Callable[[int], Pair], layers: list[int]) -> None:
        self.rows = max(4, 2 * self.rows)
        for layer in layers:
            grown = []
            for n, like in enumerate(source(layer)):
                # Zeros: what lies behind a row's end is multiplied by zero, and must be a number.
                made = like.new_zeros(self.rows, like.shape[1], self.tokens, like.shape[3])
                if layer in self.layers:
                    old = self.layers[layer][n]
                    made[: len(old)] = old
                grown.append(made)
            self.layers[layer] = Pair(*grown)

    def leave(self, owner: object) -> None:
        """Removes a row: the last one takes its place, and what it leaves is zeroed."""
        row, last = self.owners.index(owner), len(self.owners) - 1
        for K, V in self.layers.values():
            for t in (K, V):
                used = max(self.lengths[row], self.lengths[last])
                t[row, :, :used] = t[last, :, :used]
                t[last, :, : self.lengths[last]] = 0
        self.owners[row], self.lengths[row] = self.owners[last], self.lengths[last]
        self.owners.pop()
        self.lengths.pop()
        if not self.owners:
            self.layers, self.rows = {}, 0

    def row(self, owner: object) -> Callable[[int], Pair]:
        """Returns the owner's keys and values by layer, as views."""
        at = self.owners.index(owner)
        return lambda layer: Pair(*(t[at : at + 1] for t in self.layers[layer]))

    @property
    def bytes(self) -> int:
        """Bytes that the lane's tensors take."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)


def decode_mask(lengths: list[int], window: int | None, like: Tensor) -> Tensor | None:
    """(rows, 1, 1, t), True where a row's newest token may look, t the largest length; None where all may
    look everywhere.

    window: how many positions back a token sees, itself included.
    """
    t = max(lengths)
    if all(n == t for n in lengths) and (window is None or t <= window):
        return None
    place, n = torch.arange(t, device=like.device), torch.tensor(lengths, device=like.device)[:, None]
    seen = place < n
    if window is not None:
        seen &= place >= n - window
    return seen[:, None, None]


def chunk_mask(start: int, n: int, window: int | None, like: Tensor) -> Tensor | None:
    """(n, start + n), True where the tokens from `start` on may look; None for the plain causal square."""
    if start == 0 and (window is None or n <= window):
        return None
    query, key = (
        torch.arange(start, start + n, device=like.device)[:, None],
        torch.arange(start + n, device=like.device),
    )
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
