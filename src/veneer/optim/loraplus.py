"""LoRA+: AdamW where B, the factor on the output side, learns `ratio` times as fast.  Hayou, Ghosh & Yu 2024,
https://arxiv.org/abs/2402.12354

lr_A = lr, lr_B = ratio lr. Only B is multiplied. The authors' code and PEFT's also multiply every vector
(biases, norms, DoRA's magnitude), for which the paper's argument about the width gives no ground, and give
changed embeddings a fixed rate of 1e-6; here embeddings keep the run's rate, or one of their own
(embedding_lr). A and B each shrink by sqrt(1 - lr decay): under AdamW's own rule B would decay `ratio` times
as fast.

State: AdamW's.
Cost: AdamW's.
Use: at large widths, and for tasks far from what the model knows. The rate is A's, so that it is lower than
LoRA's.
Against: the best ratio depends on the task; where rates were tuned for each, variants of LoRA ended within 1
to 2 % of each other (https://arxiv.org/abs/2602.04998).
"""

from __future__ import annotations

import torch

from veneer.errors import ConfigError
from veneer.optim.base import groups
from veneer.optim.base.optimiser import Optimiser, Trained


class LoRAPlus(Optimiser):
    """AdamW at the run's rate for A, and `ratio` times the rate for B."""

    needs = frozenset({"B"})

    def __init__(self, *, ratio: float = 16.0) -> None:
        """
        ratio: rate of B in multiples of A's; the paper recommends 16 (section 5), and at least 1 by its
        theory
        """
        if not ratio > 0:
            raise ConfigError(f"ratio must be > 0, got {ratio:g}")
        self.ratio = ratio
        if ratio < 1:
            self.doubts = {"ratio": f"ratio {ratio:g} < 1 slows B down, the opposite of LoRA+; use >= 1"}

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return groups.adamw(
            trained.parts, {"B": self.ratio}, embedding=trained.embedding, betas=trained.betas
        )
