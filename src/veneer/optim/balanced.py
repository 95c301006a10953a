"""Balanced LoRA+: AdamW's directions, as long as each moves the product B A equally far.  New here; compare
https://arxiv.org/abs/2402.12354

With Adam's directions u_A, u_B, a = ||B u_A||, b = ||u_B A|| (Frobenius, from (r, r) Gram matrices) and t =
sqrt(out in) / (2 s): A <- A - lr t u_A / (a + floor b),  B <- B - lr t u_B / (b + floor a).  So lr is about
how far a weight of W moves, and the ratio of LoRA+ follows ||B|| / ||A|| through the training: below 1 while
B is small.

State: AdamW's.
Cost: four products of r^2 (out + in) a layer and step.
Use: to have LoRA+'s idea without choosing a ratio. The rate is of the size of full fine-tuning's.
Against: a rule of this project, tried on toys and on the built-in model alone; it depends on how B A is split
into factors, as Adam's directions do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.optim.base.moments import directions
from veneer.optim.base.paired import Rule
from veneer.optim.base.pairs import Bucket


class Balanced(Rule):
    """AdamW's directions with the same budget in weight space for both factors."""

    def __init__(self, *, floor: float = 0.1) -> None:
        """
        floor: least reach of a factor, relative to the other's, so that steps stay bounded at B = 0
        """
        if not 0 < floor <= 1:
            raise ConfigError(f"floor must be in (0, 1], got {floor:g}")
        self.floor = floor

    def steps(self, bucket: Bucket, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
        AA, BB = bucket.products()
        uA, uB = directions(bucket.states_a, bucket.gA, betas), directions(bucket.states_b, bucket.gB, betas)
        a, b = product_norm(BB, uA @ uA.mT), product_norm(uB.mT @ uB, AA)
        t = math.sqrt(bucket.B.shape[-2] * bucket.A.shape[-1]) / (2 * bucket.s)
        return t * over(uA, a + self.floor * b), t * over(uB, b + self.floor * a)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Returns ||L R|| (.., 1, 1) in the Frobenius norm, from L'L and R R' (.., r, r)."""
    return (left * right).sum((-2, -1), keepdim=True).clamp_min(0).sqrt()


def over(u: Tensor, length: Tensor) -> Tensor:
    """Returns u / length, and 0 for a length of 0."""
    return torch.where(length > 0, u / length, 0)
