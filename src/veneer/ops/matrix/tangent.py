"""Steps of A and B whose first-order change of s B A is nearest to the full one: LoRA-Pro's maths.

With W = W0 + s B A, A (.., r, n), B (.., m, r), and the gradients gA = s B'G (.., r, n), gB = s G A' (.., m,
r), the pair

    dA = (B'B)^+ gA / s^2 + X A,    dB = (1 - B (B'B)^+ B') gB (A A')^+ / s^2 - B X

has s (B dA + dB A) = G - (1 - P_B) G (1 - P_A), the projection of G onto what a change of A and B can reach,
for every X (r, r).  Wang et al. 2024, https://arxiv.org/abs/2407.18242, theorems 2.1 and 2.3. Any leading
dimensions are a batch of layers; the cost is O((m + n) r^2 + r^3) a layer, and no (m, n) matrix is made.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from veneer.ops.matrix.grams import Gram, gram

Choice = Literal["sylvester", "zero", "symmetric"]


class Inverses(NamedTuple):
    """Spectra a, b of A A' and B'B (.., r, r), and their damped pseudo-inverses; s as in point()."""

    s: Tensor | float
    a: Gram
    b: Gram
    of_a: Tensor
    of_b: Tensor


class Point(NamedTuple):
    """A position: A (.., r, n), B (.., m, r) and their inverses."""

    A: Tensor
    B: Tensor
    inverses: Inverses


class Mix(NamedTuple):
    """dA = on_gA gA + on_A A and dB = gB on_gB + B on_B, all (.., r, r)."""

    on_gA: Tensor
    on_A: Tensor
    on_gB: Tensor
    on_B: Tensor


def inverses(products: Tensor, s: Tensor | float, damping: float = 0.0) -> Inverses:
    """Returns the inverses from A A' and B'B, stacked (2, .., r, r).

    Both are damped by `damping` tr(A A') / r, as B'B damped by its own trace would cure nothing at B = 0.
    """
    both = gram(products)
    a, b = (Gram(w, Q) for w, Q in zip(both.w, both.Q, strict=True))
    of_a, of_b = both.power(-1, damping * a.mean)
    return Inverses(s, a, b, of_a, of_b)


def point(A: Tensor, B: Tensor, s: Tensor | float, damping: float = 0.0) -> Point:
    """Returns the point (A, B); s: a number, or (.., 1, 1)."""
    return Point(A, B, inverses(torch.stack([A @ A.mT, B.mT @ B]), s, damping))


def mix(at: Inverses, gAA: Tensor, BgB: Tensor, x: Choice = "sylvester") -> Mix:
    """Returns the mix for dA and dB from gA A' and B'gB (.., r, r), which are equal if both come from one G.

    x: how the freedom X is used. "sylvester": dA and dB are as near to gA and gB as can be; "zero": what both
    could do, A does; "symmetric": each does half of it.
    """
    s, a, b, of_a, of_b = at
    iA, iB = of_a / s**2, of_b / s**2
    PA = iB @ gAA  # (B'B)^+ gA A' / s^2
    if x == "zero":
        X = torch.zeros_like(PA)
    elif x == "symmetric":
        X = -(PA @ of_a) / 2
    else:
        total = b.w[..., :, None] + a.w[..., None, :]
        inner = b.Q.mT @ -PA @ a.Q
        X = b.Q @ torch.where(total > 0, inner / torch.where(total > 0, total, 1), 0) @ a.Q.mT
    return Mix(iB, X, iA, -X - of_b @ BgB @ iA)


def adjust(at: Point, gA: Tensor, gB: Tensor, x: Choice = "sylvester") -> tuple[Tensor, Tensor]:
    """Returns dA (.., r, n) and dB (.., m, r) from gA and gB; x as in mix()."""
    m = mix(at.inverses, gA @ at.A.mT, at.B.mT @ gB, x)
    return _plus(m.on_gA @ gA, m.on_A, at.A), _plus(gB @ m.on_gB, at.B, m.on_B)


def _plus(into: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Adds left right (.., i, j) to `into`, in place."""
    flat, L, R = (t.reshape(-1, *t.shape[-2:]) for t in (into, left, right))
    return flat.baddbmm_(L, R).view_as(into)


def squared_norm(at: Inverses, BgB: Tensor, gAgA: Tensor, gBgB: Tensor) -> Tensor:
    """Returns <gA, dA> + <gB, dB> (..) for X = 0, from B'gB, gA gA' and gB'gB (.., r, r) only.

    Without damping that is the squared norm of the projected G, and the first-order fall of the loss per unit
    of rate.
    """
    s, _, _, of_a, of_b = at
    both = of_b * (gAgA - BgB @ of_a @ BgB.mT) + of_a * gBgB
    return both.sum((-2, -1)) / (s if isinstance(s, float | int) else s[..., 0, 0]) ** 2
