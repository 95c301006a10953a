"""LoRA+: the factor on the output side learns `ratio` times as fast.  Hayou, Ghosh & Yu 2024, https://arxiv.org/abs/2402.12354

Only B is multiplied. The authors' code and PEFT's also multiply every vector (biases, norms, DoRA's magnitude), for
which the paper's argument about the width gives no ground, and give changed embeddings a fixed rate of 1e-6; here
embeddings keep the run's rate, or one of their own.
"""

from __future__ import annotations

RATIO = 16.0  # recommended by the paper, section 5; at least 1 by its theory


def scales(ratio: float) -> dict[str, float]:
    """Multiples of the run's rate by role."""
    return {"B": ratio}
