"""y + (x A') B' for spans of rows, each with factors of its own rank; keeps only x and h = x A'.

For adapters that learn side by side: neighbours of one rank and as many rows share a product, and others make
those that they would make alone. No factor is padded, so a rank of 64 beside a rank of 2 costs only its own.
Under compilation and autocast use `ops.batched`, whose operations are ordinary ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from veneer.ops.lowrank import in_place, is_traced, refuse_second_order


class Span(NamedTuple):
    """Rows from `start` on, before `stop`, of adapter `own`; 0 is the base."""

    own: int
    start: int
    stop: int


def of(ids: Sequence[int]) -> list[Span]:
    """Returns the stretches of equal ids.

    of([2, 2, 0, 1])  # [Span(2, 0, 2), Span(0, 2, 3), Span(1, 3, 4)]
    """
    found: list[Span] = []
    for i, own in enumerate(ids):
        if found and found[-1].own == own:
            found[-1] = found[-1]._replace(stop=i + 1)
        else:
            found.append(Span(own, i, i + 1))
    return found


def suits(x: Tensor) -> bool:
    """Returns True where `add` may run: eagerly, without autocast, on a CPU."""
    return not (x.is_cuda or is_traced() or torch.is_autocast_enabled(x.device.type))


class Group(NamedTuple):
    """Neighbouring spans from `first` on with as many rows and one rank, or without a change: one product."""

    first: int
    n: int
    start: int
    stop: int
    changes: bool

    def of(self, t: Tensor) -> Tensor:
        """Returns the group's rows of t (rows, width): (n, rows of each, width), or of one span as is."""
        own = t[self.start : self.stop]
        return own if self.n == 1 else own.view(self.n, -1, t.shape[1])


def add(
    x: Tensor,
    y: Tensor,
    spans: Sequence[Span],
    factors: Sequence[tuple[Tensor, Tensor] | None],
    *,
    writable: bool,
) -> Tensor:
    """Returns y + (x A') B' with span i's factors A (r, in) and B (out, r), and y itself where they are None.

    x: (.., in), y: (.., out); spans count entries of their first dimension and cover it in order, or are one.
    writable: y belongs to the caller, and nobody else reads it before this changes it.
    """
    each = y.numel() // (y.shape[-1] * spans[-1].stop)  # rows of an entry
    ranks = [0 if pair is None else pair[0].shape[0] for pair in factors]
    groups: list[Group] = []
    for i, (span, rank) in enumerate(zip(spans, ranks, strict=True)):
        start, stop = each * span.start, each * span.stop
        last = groups[-1] if groups else None
        alike = last is not None and rank and rank == ranks[last.first]
        if last is not None and alike and (last.stop - last.start) == last.n * (stop - start):
            groups[-1] = last._replace(n=last.n + 1, stop=stop)
        else:
            groups.append(Group(i, 1, start, stop, bool(rank)))
    total: Tensor = _Add.apply(
        x, y, groups, writable and in_place(y), *(t for p in factors for t in p or (None, None))
    )
    return total


def _stacked(group: Group, given: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Returns A (n, r, in) and B (n, out, r) of a group, or A (r, in) and B (out, r) of a single span."""
    own = [t for t in given[2 * group.first : 2 * (group.first + group.n)] if t is not None]
    return (own[0], own[1]) if group.n == 1 else (torch.stack(own[::2]), torch.stack(own[1::2]))


class _Add(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, groups: list[Group], in_place: bool, *given: Tensor | None
    ) -> Tensor:
        out = y if in_place else torch.empty_like(y, memory_format=torch.contiguous_format)
        rows, before, after = (t.reshape(-1, t.shape[-1]) for t in (x, y, out))
        kept: list[Tensor] = []
        for group in groups:
            if not group.changes:
                if not in_place:
                    group.of(after).copy_(group.of(before))
                continue
            A, B = _stacked(group, given)
            h = group.of(rows) @ A.mT  # (n, rows, r)
            (torch.addmm if group.n == 1 else torch.baddbmm)(group.of(before), h, B.mT, out=group.of(after))
            kept += [h, A, B]
        ctx.save_for_backward(x, *kept)
        ctx.groups, ctx.n = groups, len(given)
        if in_place:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        x, *kept = ctx.saved_tensors
        dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        rows, drows = x.reshape(-1, x.shape[-1]), None if dx is None else dx.view(-1, x.shape[-1])
        dys, parts = dy.reshape(-1, dy.shape[-1]), iter(kept)
        found: list[Tensor | None] = [None] * ctx.n
        for group in ctx.groups:
            if not group.changes:
                if drows is not None:
                    group.of(drows).zero_()
                continue
            h, A, B = next(parts), next(parts), next(parts)
            own = group.of(dys)
            dh = own @ B  # (n, rows, r)
            if drows is not None:
                torch.matmul(dh, A, out=group.of(drows))
            dA, dB = dh.mT @ group.of(rows), own.mT @ h
            for k in range(group.n):
                place = 2 * (group.first + k)
                found[place : place + 2] = [dA, dB] if group.n == 1 else [dA[k], dB[k]]
        return dx, (dy if ctx.needs_input_grad[1] else None), None, None, *found
