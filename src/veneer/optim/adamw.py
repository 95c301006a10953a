"""AdamW: every role learns at the run's rate.  Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101

Weight decay shrinks the product B A by (1 - rate * decay) a step, as it would the whole matrix.
"""

from __future__ import annotations

import torch

from veneer.optim import groups
from veneer.optim.base import Optimiser, Trained


class AdamW(Optimiser):
    """Adam with decoupled weight decay, which has no options beside the run's betas."""

    def __init__(self) -> None: ...

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return groups.adamw(trained.parts, {}, embedding=trained.embedding, betas=trained.betas)
