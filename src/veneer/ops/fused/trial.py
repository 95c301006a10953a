"""Times the kernel beside PyTorch's two steps on one device, for several numbers of rows an adapter."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import segmented
from veneer.ops.fused import product as fused
from veneer.ops.segmented import Segment

SIZES = (1, 4, 16, 64, 256)  # rows of each adapter
ADAPTERS = 8
GAIN = 0.95  # the kernel's seconds over those of two steps from which it wins


class Timed(NamedTuple):
    """rows: of each adapter; seconds of the kernel and of two steps; off: relative error against float32."""

    rows: int
    kernel: float
    steps: float
    off: float

    @property
    def wins(self) -> bool:
        """Tells if the kernel is faster, and no less exact than its dtype's rounding allows."""
        return self.kernel <= GAIN * self.steps


def trial(W: Tensor, rank: int, *, sizes: Sequence[int] = SIZES, repeats: int = 20) -> list[Timed]:
    """Times a layer of this weight (out, in) with 8 adapters of this rank, for each number of rows."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).to(W)

    out, n_in = W.shape
    A, B = drawn(ADAPTERS, rank, n_in, scale=n_in**-0.5), drawn(ADAPTERS, rank, out)
    found = []
    for rows in sizes:
        x = drawn(ADAPTERS * rows, n_in)
        segments = [(i * rows, Segment(0, i, rows)) for i in range(ADAPTERS)]
        plan, runs = fused.plan(segments, len(x), x.device), segmented.runs(segments, x)

        def kernel(x: Tensor = x, plan: fused.Plan = plan) -> Tensor:
            return fused.product(x, W, None, {0: (A, B)}, plan)

        def steps(
            x: Tensor = x, runs: list[segmented.Run] = runs, W: Tensor = W, A: Tensor = A, B: Tensor = B
        ) -> Tensor:
            y = F.linear(x, W)
            for run in runs:
                segmented.add(x, y, A, B, run)
            return y

        right = steps(x.float(), runs, W.float(), A.float(), B.float())
        off = float((kernel().float() - right).norm() / right.norm())
        found.append(Timed(rows, _seconds(kernel, repeats), _seconds(steps, repeats), off))
    return found


def won(found: Sequence[Timed]) -> tuple[int, int] | None:
    """Returns the least and most rows of an adapter for which the kernel wins: the longest such stretch."""
    stretches = [list(some) for wins, some in itertools.groupby(found, lambda t: t.wins) if wins]
    best = max(stretches, key=len, default=None)
    return None if best is None else (best[0].rows, best[-1].rows)


def _seconds(call: Callable[[], Tensor], repeats: int) -> float:
    """Returns the median seconds of a call."""
    taken = []
    for _ in range(repeats + 2):
        on_gpu = call().is_cuda  # warms up, and waits for what came before
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return sorted(taken[2:])[repeats // 2]
