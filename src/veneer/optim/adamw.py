"""AdamW: every role learns at the run's rate.  Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101

p <- (1 - lr decay) p - lr m / (sqrt(v) + 1e-8), with running means m of the gradient and v of its square, by
the run's betas. A and B each shrink by sqrt(1 - lr decay), so that B A shrinks as the whole matrix would.

State: two numbers for each that is trained, in float32.
Cost: a few passes over what is trained, fused into one.
Use: unless something else has been shown to be better at rates tuned for both.
Against: one rate for A and B, though they begin at different sizes; how far W moves depends on how B A is
split.
"""

from __future__ import annotations

import torch

from veneer.optim.base import groups
from veneer.optim.base.optimiser import Optimiser, Trained


class AdamW(Optimiser):
    """Adam with decoupled weight decay, without options of its own."""

    def __init__(self) -> None: ...

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return groups.adamw(trained.parts, {}, embedding=trained.embedding, betas=trained.betas)
