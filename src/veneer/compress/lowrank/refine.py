"""Trains a compressed block on the original block's outputs, from the inputs that the compressed blocks
before it give.

AA-SVD 2026 (https://arxiv.org/abs/2604.02119), with float32 weights, a part of the batches held out to stop
by, and no weight decay. All parameters of the block are trained: factors, biases, norms, and layers that
stayed dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.compress.lowrank.walk import Entered
from veneer.ops.draws import keyed

HELD_OUT = 8  # one batch in so many, and at least one
WARM_UP, FLOOR, CLIP = 0.1, 0.1, 1.0


def refine(
    i: int,
    block: nn.Module,
    entered: Sequence[Entered],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    epochs: int,
    rate: float,
    seed: int,
) -> tuple[float, float]:
    """Trains block i in place and returns its relative squared error on the held-out batches before and
    after.

    The weights are those of the epoch with the least such error, the start included. inputs, targets: hidden
    states (b, t, width) of every batch. With one batch alone it is trained and stopped by the same.
    """
    held = list(range(len(inputs)))[::HELD_OUT]
    train = [j for j in range(len(inputs)) if j not in held] or held
    first = best = _error(i, block, entered, inputs, targets, held)
    kept = {n: t.clone() for n, t in block.state_dict().items()}
    parameters = [p.requires_grad_(True) for p in block.parameters() if p.is_floating_point()]
    adam = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps))
    draw = keyed(seed, f"order of block {i}")
    for _ in range(epochs):
        for k in torch.randperm(len(train), generator=draw).tolist():
            j = train[k]
            with torch.enable_grad():
                squares, n = _squares(entered[j].run(i, block, inputs[j]) - targets[j], entered[j].mask)
                (squares / n).backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            adam.step()
            adam.zero_grad()
            schedule.step()
        now = _error(i, block, entered, inputs, targets, held)
        if now < best:
            best, kept = now, {n: t.clone() for n, t in block.state_dict().items()}
    block.load_state_dict(kept)
    block.requires_grad_(False)
    return first, best


def _share(step: int, steps: int) -> float:
    """The share of the rate: warm-up, then a cosine down to a floor."""
    warm = WARM_UP * steps
    return min(1.0, (step + 1) / max(warm, 1.0)) * (
        FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
    )


@torch.no_grad()
def _error(
    i: int,
    block: nn.Module,
    entered: Sequence[Entered],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    some: Sequence[int],
) -> float:
    """The squared error of the block's outputs over the squared changes that the block makes."""
    error = size = 0.0
    for j in some:
        error += float(_squares(entered[j].run(i, block, inputs[j]) - targets[j], entered[j].mask)[0])
        size += float(_squares(targets[j] - inputs[j], entered[j].mask)[0])
    return error / max(size, torch.finfo(torch.float32).tiny)


def _squares(apart: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """The sum of squares over the tokens that count, and how many numbers they are."""
    if mask is not None:
        apart = apart[mask]
    return apart.square().sum(), max(apart.numel(), 1)
