"""Trains a compressed block on the original block's outputs, from the inputs that the compressed blocks
before it give.

AA-SVD 2026 (https://arxiv.org/abs/2604.02119), with float32 weights, a part of the batches held out to stop
by, and no weight decay. All parameters of the block are trained: factors, biases, norms, and layers that
stayed dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.compress.lowrank.walk import Entered
from veneer.ops.draws import keyed

HELD_OUT = 8  # one batch in so many, and at least one
WARM_UP, FLOOR, CLIP = 0.1, 0.1, 1.0


class Pairs(NamedTuple):
    """Block number i, and for every batch the hidden states (b, t, width) that enter it and its target."""

    i: int
    entered: Sequence[Entered]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]

    def squares(self, block: nn.Module, j: int) -> tuple[Tensor, int]:
        """The squared error of the block's outputs on batch j, and how many numbers it sums."""
        made = self.entered[j].run(self.i, block, self.inputs[j])
        return _squares(made - self.targets[j], self.entered[j].mask)

    @torch.no_grad()
    def error(self, block: nn.Module, some: Sequence[int]) -> float:
        """The squared error of the outputs over the squared change that the original block makes."""
        off = sum(float(self.squares(block, j)[0]) for j in some)
        moved = [_squares(self.targets[j] - self.inputs[j], self.entered[j].mask)[0] for j in some]
        return off / max(float(sum(moved)), torch.finfo(torch.float32).tiny)


def refine(block: nn.Module, pairs: Pairs, *, epochs: int, rate: float, seed: int) -> tuple[float, float]:
    """Trains the block in place and returns its relative error on held-out batches before and after.

    The weights are those of the epoch with the least such error, the start included. A single batch is
    trained on and stopped by.
    """
    held = list(range(len(pairs.inputs)))[::HELD_OUT]
    train = [j for j in range(len(pairs.inputs)) if j not in held] or held
    first = best = pairs.error(block, held)
    kept = {n: t.clone() for n, t in block.state_dict().items()}
    parameters = [p.requires_grad_(True) for p in block.parameters() if p.is_floating_point()]
    adam = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps))
    draw = keyed(seed, f"order of block {pairs.i}")
    for _ in range(epochs):
        for k in torch.randperm(len(train), generator=draw).tolist():
            with torch.enable_grad():
                squares, n = pairs.squares(block, train[k])
                (squares / n).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            adam.step()
            adam.zero_grad()
            schedule.step()
        now = pairs.error(block, held)
        if now < best:
            best, kept = now, {n: t.clone() for n, t in block.state_dict().items()}
    block.load_state_dict(kept)
    block.requires_grad_(False)
    return first, best


def _share(step: int, steps: int) -> float:
    """The share of the rate: warm-up, then a cosine down to a floor."""
    warm = min(1.0, (step + 1) / max(WARM_UP * steps, 1.0))
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))))


def _squares(apart: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """The sum of squares over the tokens that count, and how many numbers they are."""
    if mask is not None:
        apart = apart[mask]
    return apart.square().sum(), max(apart.numel(), 1)
