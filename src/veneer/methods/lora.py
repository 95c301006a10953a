"""LoRA: W' = W + s (B A - B0 A0), s = alpha / r.  Hu et al. 2021, https://arxiv.org/abs/2106.09685

B0 A0 is where B A starts, zero for most starts.

Parameters: r (in + out) a layer.
State: A and B, and A0 and B0 where the start is not zero.
Cost: two products of rank r a token, of 2 r with such a start; keeps the layer's input for the backward, which A's gradient
needs, and r numbers a token. Merged: none.
Use: before anything else. What other methods gain over it is small next to what a rate that was looked for gains.
Against: a change of rank r at most, which is little where there is much to learn.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, FormatError
from veneer.methods import inits
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.peft import (
    PeftForm,
    PeftStored,
    check_peft_tensors,
    peft_same_map,
    peft_shapes,
    peft_tensors,
)
from veneer.methods.base.protocols import SubtractsStart
from veneer.methods.base.stats import Stats
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_rank
from veneer.sites import Site


@final
class LoRA(FactoredDelta, SubtractsStart, PeftStored):
    """A (r, in) and B (out, r). A start with B0 A0 != 0 (PiSSA, OLoRA, LoRA-GA) is kept and subtracted: W is never written."""

    roles = {"A": "A", "B": "B"}
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        site: Site,
        stats: Stats | None = None,
        *,
        rank: int = 8,
        alpha: float | None = None,
        stabilised: bool = False,
        dropout: float = 0.0,
        init: str = "kaiming",
        init_options: dict[str, float | str] | None = None,
        seed: int = 0,
    ) -> None:
        """
        rank: r, at most min(out, in)
        alpha: scale numerator; 2 x rank unless given, rank for pissa, qpissa and olora, 16 sqrt(rank) for loraga
        stabilised: s = alpha / sqrt(r) instead of alpha / r (rsLoRA, https://arxiv.org/abs/2312.03732)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        init: how A and B start: kaiming, gaussian, pissa, olora, orthogonal; loraga looks at the loss; qpissa, loftq on a quantised base
        init_options: the start's own options by name, such as gamma=64
        seed: draws are keyed by (seed, layer name)
        """
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {dropout}")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ConfigError(f"alpha must be a number above 0, not {alpha}")
        check_rank(rank, site.weight(), site.name)
        chosen = inits.get(init)
        inits.check(init, init_options)
        self.alpha = float(alpha if alpha is not None else chosen.alpha(rank, stabilised))
        self.stabilised, self.dropout = stabilised, dropout
        self.scaling = self.alpha / (math.sqrt(rank) if stabilised else rank)
        W = site.weight().detach().to(master_dtype(site))
        given = inits.Start(W, rank, self.scaling, keyed(seed, site.name), site.kind == "embedding", stats)
        A, B = chosen.start(given, **(init_options or {}))
        shifted = not A.is_meta and bool(A.any()) and bool(B.any()) and chosen.NEEDS != "residual"
        self._hold(A, B, A.clone() if shifted else None, B.clone() if shifted else None)

    def _hold(self, A: Tensor, B: Tensor, A0: Tensor | None, B0: Tensor | None) -> None:
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)

    @classmethod
    def holding(
        cls,
        site: Site,
        A: Tensor,
        B: Tensor,
        *,
        alpha: float,
        stabilised: bool = False,
        dropout: float = 0.0,
        start: int = 0,
    ) -> LoRA:
        """The change s B A with these factors (k, in), (out, k), of any rank k, where s is that of alpha and k.

        start: how many of the ranks stand for a start A0, B0 that is subtracted; A and B are then laid out as by pair().
        """
        delta = cls.__new__(cls)  # __init__ would draw a start, from a copy of W
        nn.Module.__init__(delta)
        k, r = A.shape[0], A.shape[0] - start
        like = torch.empty(0, dtype=master_dtype(site), device=site.device)
        A, B = A.detach().to(like, copy=True), B.detach().to(like, copy=True)
        delta.dropout, delta.scaling, delta.stabilised = (
            dropout,
            alpha / (math.sqrt(k) if stabilised else k),
            stabilised,
        )
        delta.alpha = delta.scaling * (math.sqrt(r) if stabilised else r)
        if start:
            A, A0, B, B0 = A[:r], A[:r] - A[r:], B[:, :r] + B[:, r:], B[:, r:].clone()
            delta._hold(A, B, A0, B0)
        else:
            delta._hold(A, B, None, None)
        delta.options = {"rank": r, "alpha": delta.alpha, "stabilised": stabilised, "dropout": dropout}
        return delta

    def factors(self, site: Site) -> Factors:
        A, B = self.pair()
        return Factors(A, self.scaling * B)

    def taken(self) -> Factors | None:
        return None if self.A0 is None or self.B0 is None else Factors(self.A0, self.scaling * self.B0)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (k, in), B (out, k) with B A the unscaled change; k = r, or 2r where a start is subtracted.

        B A - B0 A0 = (B - B0) A + B0 (A - A0): the differences are taken in float32, so that neither the start
        (exactly zero) nor a small step is lost when the factors are rounded to bfloat16 for the product.
        """
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1)

    def to_peft(self, site: Site) -> PeftForm | None:
        """Plain LoRA on the untouched base; rank 2r with the same scaling where a start was subtracted.

        `start_rank`, which is none of PEFT's settings, then says that the ranks are those of pair().
        """
        if not peft_same_map(site):
            return None
        A, B = self.pair()
        k = A.shape[0]
        config = {
            "peft_type": "LORA",
            "r": k,
            "lora_alpha": self.alpha
            if self.A0 is None
            else self.scaling * (math.sqrt(k) if self.stabilised else k),
            "use_rslora": self.stabilised,
            "lora_dropout": self.dropout,
            **({} if self.A0 is None else {"start_rank": self.A0.shape[0]}),
        }
        return PeftForm(config, peft_tensors(site, A.detach(), B.detach()))

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> LoRA:
        if not peft_same_map(site):
            raise FormatError(
                f"{site.name}: PEFT's forward ignores this convolution's groups, dilation or padding mode, so that what was"
                f" trained there is no change of its weight; train it again without this layer"
            )
        check_peft_tensors(site, tensors, peft_shapes(site, config["r"]))
        A, B = (tensors[n].flatten(1) for n in peft_shapes(site, config["r"]))
        return cls.holding(
            site,
            A,
            B,
            alpha=config["lora_alpha"],
            stabilised=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0),
            start=config.get("start_rank", 0),
        )
