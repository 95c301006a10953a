"""Linear layers whose W (out, in) is a product of two thin matrices, each in a linear layer of its own.

Two forms. FactoredLinear holds A (r, in) and B (out, r): r (in + out) numbers. PivotedLinear fixes the
product's gauge: A holds r of its rows, and C (out - r, r) makes the others of them: r (in +
out) - r^2 numbers, never more than W has. Both factors are layers, plain or quantised, so that whatever packs
a layer packs them. Pivoted storage: PIFA, 2025, https://arxiv.org/abs/2501.19090.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.ops.matrix.pivots import pivots
from veneer.sites.quantised_linear import QuantisedLinear

Inner = nn.Linear | QuantisedLinear


class Factored(nn.Module, ABC):
    """y = W x + bias for x (.., in), with W of rank r."""

    form: ClassVar[str]
    inner: ClassVar[tuple[str, str]]  # names of the two layers, in the order of their products
    A: Any
    bias: nn.Parameter | None
    transposed = False  # the model's own class for this layer stores W as (in, out)
    added_bias = False  # the model's own class for this layer has no bias

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) with W = B A, unpacked, in float32 at least."""

    @abstractmethod
    def become(self, A: Tensor, B: Tensor) -> None:
        """Takes factors A (r', in) and B (out, r') of any rank, in the old dtype or format."""

    @property
    def in_features(self) -> int:
        return self.A.in_features  # type: ignore[no-any-return]

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.A.out_features  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the factors are computed with."""
        held: torch.dtype = self.A.dtype if isinstance(self.A, QuantisedLinear) else self.A.weight.dtype
        return held

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.A.parameters()).device
        return found

    @property
    def weight(self) -> Tensor:
        """W (out, in), multiplied anew each time, in float32 at least: rounded to bfloat16 its rank would be
        full.
        """
        A, B = self.factors()
        return B @ A

    def formats(self) -> dict[str, str]:
        """The format of each packed factor by the factor's name."""
        held = {n: getattr(self, n) for n in self.inner}
        return {n: m.format.name for n, m in held.items() if isinstance(m, QuantisedLinear)}


class FactoredLinear(Factored):
    """y = B (A x) + bias."""

    form = "plain"
    inner = ("A", "B")

    def __init__(self, A: Inner, B: Inner) -> None:
        """
        B: the layer with the bias, which is added within its product
        """
        super().__init__()
        self.A, self.B = A, B

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        return self.B.bias

    @property
    def out_features(self) -> int:
        return self.B.out_features

    def factors(self) -> tuple[Tensor, Tensor]:
        return _wide(self.A.weight), _wide(self.B.weight)

    def become(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = like(self.A, A), like(self.B, B, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.B(self.A(x))
        return y

    def extra_repr(self) -> str:
        return _told(self)


class PivotedLinear(Factored):
    """y = (h, C h)[order] + bias with h = A x: the rows of A are r rows of W, and order (out,) puts all in
    place.

    Rounded to bfloat16 it errs about three times as much as two plain factors.
    """

    form = "pivoted"
    inner = ("A", "C")
    order: Tensor

    def __init__(self, A: Inner, C: Inner, order: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.A, self.C, self.bias = A, C, bias
        self.register_buffer("order", order)

    @property
    def out_features(self) -> int:
        return len(self.order)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, C = _wide(self.A.weight), _wide(self.C.weight)
        return A, torch.cat([torch.eye(len(A), dtype=A.dtype, device=A.device), C])[self.order]

    def become(self, A: Tensor, B: Tensor) -> None:
        """Turns into a FactoredLinear: rows of W round with the error of all of W, factors with that of their
        change.
        """
        A_layer, B_layer = like(self.A, A), like(self.C, B, self.bias)
        del self.C, self.order, self.bias
        self.__class__ = FactoredLinear  # type: ignore[assignment]
        self.A, self.B = A_layer, B_layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.A(x)
        y = torch.cat([h, self.C(h)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return _told(self)


FORMS: dict[str, type[Factored]] = {f.form: f for f in (FactoredLinear, PivotedLinear)}


def hollow(form: str, out: int, in_: int, rank: int, bias: bool, dtype: torch.dtype) -> Factored:
    """Returns a layer of the form without content: its parameters are on the meta device, for weights to
    come.
    """
    A = plain_linear(torch.empty(rank, in_, dtype=dtype, device="meta"))
    own = nn.Parameter(torch.empty(out, dtype=dtype, device="meta"), requires_grad=False) if bias else None
    if form == "pivoted":
        C = plain_linear(torch.empty(out - rank, rank, dtype=dtype, device="meta"))
        return PivotedLinear(A, C, torch.empty(out, dtype=torch.int32, device="meta"), own)
    return FactoredLinear(A, plain_linear(torch.empty(out, rank, dtype=dtype, device="meta"), own))


def holding(form: str, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Factored:
    """Returns a frozen layer of the form that holds B A for A (r, in) and B (out, r), in A's dtype."""
    own = None if bias is None else nn.Parameter(bias.to(A.dtype), requires_grad=False)
    if form == "plain":
        return FactoredLinear(plain_linear(A), plain_linear(B, own))
    held = pivots(B)
    rows = (B.double()[held.rows] @ A.double()).to(A.dtype)
    return PivotedLinear(plain_linear(rows), plain_linear(held.C.to(A.dtype)), held.order.int(), own)


def plain_linear(W: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer that holds W (out, in) itself."""
    made = nn.Linear(
        1, 1, bias=False, device="meta"
    )  # torch warns of an empty weight, which a factor may have
    made.out_features, made.in_features = W.shape
    made.weight = nn.Parameter(W.detach(), requires_grad=False)
    if bias is not None:
        made.register_parameter("bias", bias)
    return made


def like(old: Inner, W: Tensor, bias: nn.Parameter | None = None) -> Inner:
    """A layer of the old one's kind, dtype and format that holds another W."""
    if isinstance(old, QuantisedLinear):
        packed = old.format.pack(W.to(old.dtype))
        return QuantisedLinear(packed, (W.shape[0], W.shape[1]), bias, old.format).train(old.training)
    made = plain_linear(W.to(old.weight.dtype), bias).train(old.training)
    made.weight.requires_grad_(old.weight.requires_grad)
    return made


def parameters_of(out: int, in_: int, rank: int, form: str = "plain") -> int:
    """Numbers that a layer (out, in) of this rank and form holds, its bias not counted."""
    return rank * (out + in_) - (rank * rank if form == "pivoted" else 0)


def rank_within(out: int, in_: int, numbers: float, form: str = "plain") -> int:
    """The largest rank whose factors take at most so many numbers; 0 where no rank does."""
    if form == "plain":
        return max(0, min(int(numbers // (out + in_)), min(out, in_)))
    total = out + in_
    inside = total * total - 4 * numbers
    found = min(out, in_) if inside <= 0 else min(int((total - inside**0.5) / 2), min(out, in_))
    while found > 0 and parameters_of(out, in_, found, form) > numbers:
        found -= 1
    return max(0, found)


def _wide(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))


def _told(layer: Any) -> str:
    formats = "".join(f", {n} in {f}" for n, f in layer.formats().items())
    return (
        f"in_features={layer.in_features}, out_features={layer.out_features}, rank={layer.rank}, "
        f"bias={layer.bias is not None}{formats}"
    )
