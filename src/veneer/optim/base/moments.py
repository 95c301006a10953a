"""Adam's moments in at least float32, so that they decay under bfloat16 gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.matrix.linalg import precise

EPS = 1e-8
State = dict[str, Tensor]


def count(state: State) -> int:
    """Counts the current step, from 1, in the state and returns it."""
    state["step"] = state.get("step", torch.zeros(())) + 1
    return int(state["step"])


def mean(state: State, name: str, new: Tensor, beta: float) -> Tensor:
    """Updates and returns the running mean m <- beta m + (1 - beta) new, without bias correction."""
    if name not in state:
        state[name] = torch.zeros_like(precise(new))
    return state[name].lerp_(precise(new), 1 - beta)


def direction(state: State, gradient: Tensor, betas: tuple[float, float]) -> Tensor:
    """Returns Adam's m / (sqrt(v) + eps), bias-corrected (Kingma & Ba 2015, algorithm 1)."""
    t = count(state)
    m = mean(state, "exp_avg", gradient, betas[0]) / (1 - betas[0] ** t)
    v = mean(state, "exp_avg_sq", precise(gradient).square(), betas[1]) / (1 - betas[1] ** t)
    return m / v.sqrt().add_(EPS)


def directions(states: Sequence[State], gradients: Tensor, betas: tuple[float, float]) -> Tensor:
    """Returns `direction` of every gradient of a stack (L, ..), stacked."""
    return torch.stack([direction(s, g, betas) for s, g in zip(states, gradients, strict=True)])
