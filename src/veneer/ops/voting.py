"""Joins several dense changes of one matrix: TIES and DARE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def trim(D: Tensor, density: float) -> Tensor:
    """Returns D with all but the largest `density` share of its numbers, by magnitude, set to zero."""
    k = max(1, round(density * D.numel()))
    threshold = D.abs().flatten().kthvalue(D.numel() - k + 1).values
    return torch.where(D.abs() >= threshold, D, 0)


def ties(
    changes: Sequence[Tensor], weights: Sequence[float], density: float, *, scaled: bool = False
) -> Tensor:
    """Trims, elects signs by weighted mass, averages agreeing numbers (Yadav et al. 2023, section 3).

    The average is weighted: sum(w D) / sum(|w|) over the agreeing changes. Only ratios of weights count. With
    equal weights this is the paper's mean; the paper's lambda is the strength the result is used at.
    scaled: sum(w D) / number of agreeing changes, as in PEFT; weights then scale the result too.
    https://arxiv.org/abs/2306.01708
    """
    trimmed = torch.stack([trim(D, density) for D in changes])
    w = torch.tensor(weights, dtype=trimmed.dtype, device=trimmed.device).view(-1, *(1,) * (trimmed.ndim - 1))
    sign = (w * trimmed).sum(0).sign()
    agree = (w * trimmed).sign() * sign > 0
    mass = (agree * (torch.ones_like(w) if scaled else w.abs())).sum(0)
    return (agree * w * trimmed).sum(0) / torch.where(mass > 0, mass, 1)


def dare(D: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Keeps each number of D with probability `density`, divided by it (Yu et al. 2024, section 3.1).

    https://arxiv.org/abs/2311.03099
    """
    keep = torch.rand(D.shape, generator=draw) < density
    return torch.where(keep.to(D.device), D / density, 0)
