"""Adam's moments: kept in float32 at least, so that they decay where the gradient is in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.matrix.linalg import precise

EPS = 1e-8
State = dict[str, Tensor]


def count(state: State) -> int:
    """The step that is being taken, from 1; it is remembered."""
    state["step"] = state.get("step", torch.zeros(())) + 1
    return int(state["step"])


def mean(state: State, name: str, new: Tensor, beta: float) -> Tensor:
    """The running mean m <- beta m + (1 - beta) new under `name`, as it is kept (without the correction for
    its start at 0)."""
    if name not in state:
        state[name] = torch.zeros_like(precise(new))
    return state[name].lerp_(precise(new), 1 - beta)


def direction(state: State, gradient: Tensor, betas: tuple[float, float]) -> Tensor:
    """Adam's m / (sqrt(v) + eps), both corrected for their start at 0 (Kingma & Ba 2015, algorithm 1)."""
    t = count(state)
    m = mean(state, "exp_avg", gradient, betas[0]) / (1 - betas[0] ** t)
    v = mean(state, "exp_avg_sq", precise(gradient).square(), betas[1]) / (1 - betas[1] ** t)
    return m / v.sqrt().add_(EPS)


def directions(states: Sequence[State], gradients: Tensor, betas: tuple[float, float]) -> Tensor:
    """`direction` of every gradient of a stack (L, ..), stacked."""
    return torch.stack([direction(s, g, betas) for s, g in zip(states, gradients, strict=True)])
