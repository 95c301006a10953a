"""Steps of A and B whose first-order change of s B A is the nearest to that of the whole matrix: the maths of LoRA-Pro.

With W = W0 + s B A, A (.., r, n), B (.., m, r), and the gradients gA = s B'G (.., r, n), gB = s G A' (.., m, r), the pair

    dA = (B'B)^+ gA / s^2 + X A,    dB = (1 - B (B'B)^+ B') gB (A A')^+ / s^2 - B X

has s (B dA + dB A) = G - (1 - P_B) G (1 - P_A), the projection of G onto what a change of A and B can reach, for every X
(r, r).  Wang et al. 2024, https://arxiv.org/abs/2407.18242, theorems 2.1 and 2.3. Any leading dimensions are a batch of layers;
the cost is O((m + n) r^2 + r^3) a layer, and no (m, n) matrix is made.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from veneer.ops.grams import Gram, gram

Choice = Literal["sylvester", "zero", "symmetric"]


class Point(NamedTuple):
    """Where A and B stand. a, b: spectra of A A' and B'B; inverse_a, inverse_b: their damped pseudo-inverses (.., r, r)."""

    A: Tensor
    B: Tensor
    s: Tensor | float
    a: Gram
    b: Gram
    inverse_a: Tensor
    inverse_b: Tensor


def point(A: Tensor, B: Tensor, s: Tensor | float, damping: float = 0.0, grams: tuple[Gram, Gram] | None = None) -> Point:
    """The point (A, B). Both Grams are damped by `damping` tr(A A') / r, as B'B damped by its own trace would cure nothing at B = 0.

    s: a number, or (.., 1, 1). grams: the spectra of A A' and B'B where they are known.
    """
    a, b = grams or (gram(A @ A.mT), gram(B.mT @ B))
    shift = damping * a.mean
    return Point(A, B, s, a, b, a.power(-1, shift), b.power(-1, shift))


def adjust(at: Point, gA: Tensor, gB: Tensor, x: Choice = "sylvester") -> tuple[Tensor, Tensor]:
    """dA (.., r, n) and dB (.., m, r).

    x: how the freedom X is used. "sylvester": dA and dB are as near to gA and gB as can be; "zero": what both could do, A
    does; "symmetric": each does half of it.
    """
    A, B, s, a, b, inverse_a, inverse_b = at
    iA, iB = inverse_a / s**2, inverse_b / s**2
    K = inverse_b @ (B.mT @ gB) @ iA  # (.., r, r)
    if x == "zero":
        return iB @ gA, _plus(gB @ iA, B, -K)
    PA = iB @ (gA @ A.mT)
    if x == "symmetric":
        X = -(PA @ inverse_a) / 2
    else:
        total = b.w[..., :, None] + a.w[..., None, :]
        inner = b.Q.mT @ -PA @ a.Q
        X = b.Q @ torch.where(total > 0, inner / torch.where(total > 0, total, 1), 0) @ a.Q.mT
    return _plus(iB @ gA, X, A), _plus(gB @ iA, B, -K - X)


def _plus(into: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """into + left right (.., i, j), added in place."""
    flat, L, R = (t.reshape(-1, *t.shape[-2:]) for t in (into, left, right))
    return flat.baddbmm_(L, R).view_as(into)


def squared_norm(at: Point, gA: Tensor, gB: Tensor) -> Tensor:
    """<gA, dA> + <gB, dB> (..) with the pair of X = 0, from (r, r) products alone.

    Without damping that is the squared norm of the projected G, and the first-order fall of the loss per unit of rate.
    """
    K = at.B.mT @ gB
    both = at.inverse_b * (gA @ gA.mT - K @ at.inverse_a @ K.mT) + at.inverse_a * (gB.mT @ gB)
    s = at.s if isinstance(at.s, float | int) else at.s[..., 0, 0]
    return both.sum((-2, -1)) / s**2
