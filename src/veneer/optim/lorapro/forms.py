"""LoRA-Pro as published: Adam's moments of the projected gradient in full size; and without moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from veneer.ops.matrix.linalg import precise
from veneer.ops.matrix.tangent import Choice, Inverses, Point, adjust, inverses, mix, squared_norm
from veneer.optim.base.moments import direction
from veneer.optim.base.optimiser import Trained
from veneer.optim.base.owned import Owned
from veneer.optim.base.paired import Paired
from veneer.optim.base.pairs import Bucket, inner


class Projected(Paired):
    """Shared by the forms: the point of A and B, and the norm of the projected gradient."""

    def __init__(self, trained: Trained, x: Choice, damping: float) -> None:
        super().__init__(trained)
        self.x, self.damping = x, damping

    def point(self, bucket: Bucket) -> Point:
        """Returns the point of a bucket's pairs. Raises NotFinite."""
        return Point(bucket.A, bucket.B, self.inverses(bucket))

    def inverses(self, bucket: Bucket) -> Inverses:
        """Returns the inverses of a bucket's Gram matrices. Raises NotFinite."""
        return inverses(bucket.products(), bucket.s, self.damping)

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Clips by the norm of the full matrices' projected gradient, jointly with other parameters."""
        squares = [self._square(b) for b in self.buckets()]
        others = [
            p
            for group in self.param_groups
            if not group["where"]
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.stack([*squares, *(p.grad.square().sum() for p in others)]).sum().sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad.dtype))
        return norm

    def _square(self, bucket: Bucket) -> Tensor:
        gA, gB, B = bucket.every_gA, *([t.t() for t in every] for every in (bucket.every_gB, bucket.every_B))
        return squared_norm(self.inverses(bucket), inner(B, gB), inner(gA, gA), inner(gB, gB)).sum()


class Plain(Projected):
    """Descent along the projected gradient: Riemannian gradient descent on matrices of rank r."""

    mixes = True

    def steps(self, bucket: Bucket) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        if not bucket.one_by_one:
            return adjust(self.point(bucket), bucket.gA, bucket.gB, self.x)
        sides = (
            [*zip(bucket.every_A, bucket.every_gA, strict=True)],
            [*zip(bucket.every_B, bucket.every_gB, strict=True)],
        )
        BgB = inner([B.t() for B in bucket.every_B], [g.t() for g in bucket.every_gB])
        m = mix(self.inverses(bucket), inner(bucket.every_gA, bucket.every_A), BgB, self.x)
        dA = [
            torch.mm(on_g, g).addmm_(on_A, A)
            for (A, g), on_g, on_A in zip(sides[0], m.on_gA, m.on_A, strict=True)
        ]
        return dA, [
            torch.mm(g, on_g).addmm_(B, on_B)
            for (B, g), on_g, on_B in zip(sides[1], m.on_gB, m.on_B, strict=True)
        ]


class Full(Projected, Owned):
    """AdamW on the projected gradient E = s (B dA + dB A), projected again. State is kept with B.

    Among processes each pair's state lies in one of them.
    """

    def empty_state(self, A: nn.Parameter, B: nn.Parameter) -> dict[str, Tensor]:
        moment = precise(B).new_zeros(B.shape[0], A.shape[1])
        return {"step": torch.zeros(()), "exp_avg": moment, "exp_avg_sq": torch.zeros_like(moment)}

    def steps(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        at = self.point(bucket)
        dA, dB = adjust(at, bucket.gA, bucket.gB, "zero")
        gA, gB = torch.empty_like(dA), torch.empty_like(dB)
        for i, state in enumerate(bucket.states_b):  # one (m, n) matrix at a time
            A, B, s = bucket.A[i], bucket.B[i], bucket.s[i]
            g = s * direction(state, s * torch.addmm(B @ dA[i], dB[i], A), self.betas)
            gA[i], gB[i] = B.mT @ g, g @ A.mT
        return adjust(at, gA, gB, self.x)
