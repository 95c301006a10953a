"""Scaled AdamW: AdamW on (B'B + d)^-1 gA and gB (A A' + d)^-1.  Zhang & Pilanci 2024,
https://arxiv.org/abs/2402.02347

Here d = damping (tr A A' + tr B'B) / r, so that it means the same at every size of A and B; the authors' code
and PEFT's take an absolute number, and the authors' preconditions B by an A that has been stepped already.

State: AdamW's.
Cost: two products of r^2 (out + in) and two eigendecompositions of (r, r) a layer and step.
Use: in place of AdamW, at about its rates, where a step should depend less on the sizes of A and B.
Against: scaled gradient descent does not depend on how B A is split, but Adam's division, element by element,
undoes that; what A and B can both change is counted twice.
"""

from __future__ import annotations

from torch import Tensor

from veneer.optim.base.moments import directions
from veneer.optim.base.optimiser import check_damping
from veneer.optim.base.paired import Rule
from veneer.optim.base.pairs import Bucket


class Scaled(Rule):
    """AdamW on gradients scaled by the Gram matrix of the other factor."""

    def __init__(self, *, damping: float = 0.05) -> None:
        """
        damping: added to both Gram matrices, relative to their mean eigenvalue
        """
        self.damping = check_damping(damping)

    def steps(self, bucket: Bucket, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        a, b = bucket.grams()
        shift = self.damping * (a.mean + b.mean)
        gA, gB = b.power(-1, shift) @ bucket.gA, bucket.gB @ a.power(-1, shift)
        return directions(bucket.states_a, gA, betas), directions(bucket.states_b, gB, betas)
