"""LoRA-Pro with moments of the adapter's size: approximates the published form without (m, n) matrices.

The projected gradient E = s (B dA + dB A) = s L R with L = [B | dB] (m, 2r), R = [dA; A] (2r, n) has rank 2r,
so that the sums of its squares along rows and columns follow from the factors, and so does Adafactor's
direction E / sqrt(row col' / sum row): it is k L' R' with L' = L / sqrt(row), R' = R / sqrt(col), k = s
sqrt(sum row). The mean of E is kept as factors m_A, m_B and carried into the tangent space of each new point:
m_A <- (B'B)^+ B'B_old m_A, m_B <- m_B A_old A' (A A')^+. What that loses, and the separable second moment, is
all in which it differs from the published form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.matrix.tangent import Point, adjust
from veneer.optim.base.moments import EPS, count, mean
from veneer.optim.base.pairs import Bucket, stacked
from veneer.optim.lorapro.forms import Projected

LEAST = 1e-6  # of the mean second moment: below, the direction would be rounding errors of the factors


class Factored(Projected):
    """State of A: the factor m_A, column sums, A_old A'; of B: m_B, row sums, B'B_old."""

    def steps(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        at = self.point(bucket)
        A, B, s = bucket.A, bucket.B, bucket.s
        dA, dB = adjust(at, bucket.gA, bucket.gB, "zero")
        times = [count(state) for state in bucket.states_a]
        first, second = (
            torch.tensor([1 - beta**t for t in times], dtype=torch.float64).to(A)[:, None, None]
            for beta in self.betas
        )
        mA, mB = self._carried(bucket, at, dA, dB)
        row, col = self._spread(bucket, *sums(torch.cat([B, dB], 2), torch.cat([dA, A], 1), s))
        row, col = floored(row / second), floored(col / second)
        left = torch.cat([B, mB / first], 2) / row.sqrt()  # (L, m, 2r)
        right = torch.cat([mA / first, A], 1) / col.sqrt()  # (L, 2r, n)
        k = s * s * row.sum(1, keepdim=True).sqrt()
        dA, dB = adjust(at, k * (B.mT @ left) @ right, k * left @ (right @ A.mT), self.x)
        self._remember(bucket, dA, dB)
        return dA, dB

    def _carried(self, bucket: Bucket, at: Point, dA: Tensor, dB: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the running means of the factors (L, r, n), (L, m, r), transported from the last point."""
        for a, b, iA, iB in zip(
            bucket.states_a, bucket.states_b, at.inverses.of_a, at.inverses.of_b, strict=True
        ):
            if "crossed" in a:
                a["exp_avg"], b["exp_avg"] = (
                    iB @ b["crossed"] @ a["exp_avg"],
                    b["exp_avg"] @ (a["crossed"] @ iA),
                )
        beta = self.betas[0]
        mA = [mean(state, "exp_avg", d, beta) for state, d in zip(bucket.states_a, dA, strict=True)]
        mB = [mean(state, "exp_avg", d, beta) for state, d in zip(bucket.states_b, dB, strict=True)]
        return stacked(mA), stacked(mB)

    def _spread(self, bucket: Bucket, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the running means of sums of squares along rows (L, m, 1) and columns (L, 1, n)."""
        beta = self.betas[1]
        rows = [mean(state, "exp_avg_sq", new, beta) for state, new in zip(bucket.states_b, row, strict=True)]
        cols = [mean(state, "exp_avg_sq", new, beta) for state, new in zip(bucket.states_a, col, strict=True)]
        return stacked(rows), stacked(cols)

    def _remember(self, bucket: Bucket, dA: Tensor, dB: Tensor) -> None:
        """Stores A_old A' and B'B_old for the next step."""
        A, B = bucket.kept * bucket.A - bucket.rate * dA, bucket.kept * bucket.B - bucket.rate * dB
        for state, crossed in zip(bucket.states_a, bucket.A @ A.mT, strict=True):
            state["crossed"] = crossed.clone()
        for state, crossed in zip(bucket.states_b, B.mT @ bucket.B, strict=True):
            state["crossed"] = crossed.clone()


def sums(left: Tensor, right: Tensor, s: Tensor | float) -> tuple[Tensor, Tensor]:
    """Returns sums of (s L R)^2 + EPS^2 along rows (.., m, 1) and columns (.., 1, n), from L, R only."""
    row = s * s * ((left @ (right @ right.mT)) * left).sum(-1, keepdim=True)
    col = s * s * (((left.mT @ left) @ right) * right).sum(-2, keepdim=True)
    return row.clamp_min(0) + right.shape[-1] * EPS**2, col.clamp_min(0) + left.shape[-2] * EPS**2


def floored(values: Tensor) -> Tensor:
    """Returns sums (L, m, 1) or (L, 1, n), bounded below relative to their mean."""
    return torch.maximum(values, LEAST * values.mean((-2, -1), keepdim=True))
