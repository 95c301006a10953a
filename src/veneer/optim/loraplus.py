"""LoRA+: AdamW where B, the factor on the output side, learns `ratio` times as fast.  Hayou, Ghosh & Yu 2024, https://arxiv.org/abs/2402.12354

Only B is multiplied. The authors' code and PEFT's also multiply every vector (biases, norms, DoRA's magnitude), for
which the paper's argument about the width gives no ground, and give changed embeddings a fixed rate of 1e-6; here
embeddings keep the run's rate, or one of their own.
"""

from __future__ import annotations

import torch

from veneer.errors import ConfigError
from veneer.optim import groups
from veneer.optim.base import Optimiser, Trained


class LoRAPlus(Optimiser):
    """The run's rate is A's, and B's is `ratio` times it."""

    needs = frozenset({"B"})

    def __init__(self, *, ratio: float = 16.0) -> None:
        """
        ratio: rate of B in multiples of A's; the paper recommends 16 (section 5), and at least 1 by its theory
        """
        if not ratio > 0:
            raise ConfigError(f"ratio {ratio:g} must be above 0")
        self.ratio = ratio
        if ratio < 1:
            self.doubts = {"ratio": f"ratio {ratio:g} < 1 slows B down, the opposite of LoRA+; use 1 or more"}

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return groups.adamw(trained.parts, {"B": self.ratio}, embedding=trained.embedding, betas=trained.betas)
