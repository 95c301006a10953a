"""LoRA-Muon: steps of A and B that move B A equally far in the spectral norm, in all directions alike.  2026,
https://arxiv.org/abs/2606.12921

With running means m_A, m_B of the gradients, R_A = (A A' + d)^-1/2, R_B = (B'B + d)^-1/2, msign(U S V') = U
V' and t = sqrt(max(out, in)) / s:  A <- A - lr t/2 R_B msign(R_B m_A),  B <- B - lr t/2 msign(m_B R_A) R_A.
Undamped, ||B dA|| = ||dB A||, and nothing depends on how B A is split into factors. d = damping (tr A A' + tr
B'B) / r and the factor t are added here: without d the step of A is unbounded for B near 0, which includes
the start.

State: one number for each that is trained, half of AdamW's.
Cost: six products of r^2 (out + in) and four eigendecompositions of (r, r) a layer and step.
Use: for half of AdamW's state, and a rate that, by the paper, carries over between ranks and widths.
Against: young and little tried; singular values of the mean below about 0.4 % of the largest (r = 16,
float32) get no step, as msign is computed from a Gram matrix.
"""

from __future__ import annotations

import math

from torch import Tensor

from veneer.ops.matrix.grams import gram
from veneer.optim.base.moments import State, count, mean
from veneer.optim.base.optimiser import Trained, check_damping
from veneer.optim.base.paired import Rule
from veneer.optim.base.pairs import Bucket, stacked


class LoRAMuon(Rule):
    """Orthogonal steps with the same spectral budget for A and B."""

    def __init__(self, *, damping: float = 0.05) -> None:
        """
        damping: added to both Gram matrices, relative to their mean eigenvalue
        """
        self.damping = check_damping(damping)

    def state_bytes(self, trained: Trained, processes: int = 1) -> int:
        return super().state_bytes(trained) - sum(
            p.parameter.numel() * p.parameter.element_size() for p in trained.parts if p.role in "AB"
        )

    def steps(self, bucket: Bucket, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        a, b = bucket.grams()
        shift = self.damping * (a.mean + b.mean)
        RA, RB = a.power(-0.5, shift), b.power(-0.5, shift)
        hA, hB = (
            RB @ running(bucket.states_a, bucket.gA, betas[0]),
            running(bucket.states_b, bucket.gB, betas[0]) @ RA,
        )
        t = math.sqrt(max(bucket.B.shape[-2], bucket.A.shape[-1])) / (2 * bucket.s)
        return t * (RB @ gram(hA @ hA.mT).power(-0.5)) @ hA, t * hB @ (gram(hB.mT @ hB).power(-0.5) @ RA)


def running(states: list[State], gradients: Tensor, beta: float) -> Tensor:
    """Returns the running means, corrected for their start at 0, stacked."""
    return stacked(
        [mean(s, "exp_avg", g, beta) / (1 - beta ** count(s)) for s, g in zip(states, gradients, strict=True)]
    )
