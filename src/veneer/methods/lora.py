"""LoRA: W' = W + s (B A - B0 A0), s = alpha / r.  Hu et al. 2021, https://arxiv.org/abs/2106.09685

B0 A0 is the start of B A. It is zero for most starts.

Parameters: r (in + out) a layer.
State: A and B. A start other than zero adds A0 and B0.
Cost: two products of rank r per token, of rank 2 r with a start other than zero. The backward keeps the
layer's input, for A's gradient, and r numbers per token; merged: none.
Use: first. A tuned learning rate gains more than the choice among LoRA's relatives.
Against: the change has rank r at most, too little for large amounts of new material.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import FormatError
from veneer.methods import inits
from veneer.methods.base.checks import check_above_zero, check_dropout, check_rank
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
from veneer.sites import Site


@final
class LoRA(FactoredDelta, SubtractsStart, PeftStored):
    """A pair A (r, in), B (out, r), and the start A0, B0 that is subtracted because W is never written.

    Starts with B0 A0 != 0 are PiSSA, OLoRA and LoRA-GA.
    """

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
        alpha: numerator of the scale s; default 2 x rank, rank for pissa, qpissa and olora, 16 sqrt(rank) for
        loraga
        stabilised: s = alpha / sqrt(r) instead of alpha / r (rsLoRA, https://arxiv.org/abs/2312.03732)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        init: start of A and B: kaiming, gaussian, pissa, olora, orthogonal; loraga, gora and keeplora need
        the loss's gradient, eva and corda the layers' inputs; qpissa and loftq need a quantised base
        init_options: options of the start by name, such as gamma=64
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_dropout(dropout)
        check_above_zero(alpha=alpha)
        check_rank(rank, site)
        chosen = inits.get(init)
        inits.check(init, init_options)
        self.alpha = float(alpha if alpha is not None else chosen.alpha(rank, stabilised))
        self.stabilised, self.dropout = stabilised, dropout
        self.scaling = self.alpha / (math.sqrt(rank) if stabilised else rank)
        W = site.weight().detach().to(master_dtype(site))
        given = inits.Start(W, rank, self.scaling, keyed(seed, site.key), site.kind == "embedding", stats)
        A, B = chosen.start(given, **(init_options or {}))
        shifted = (
            not A.is_meta
            and bool(A.any())
            and bool(B.any())
            and not (chosen.NEEDS.residual or chosen.NEEDS.acts)
        )
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
        """Returns the change s B A with the factors A (k, in), B (out, k) of any rank k; s follows from alpha
        and k.

        start: number of the ranks that stand for a subtracted start A0, B0; A and B are then laid out as by
        pair().
        """
        delta = cls.__new__(cls)  # __init__ would draw a start, and copy W for it
        nn.Module.__init__(delta)
        k, r = A.shape[0], A.shape[0] - start
        like = torch.empty((), dtype=master_dtype(site), device=site.device)
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
        if self.A0 is None:
            return None
        assert self.B0 is not None  # both, or neither
        return Factors(self.A0, self.scaling * self.B0)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Returns A (k, in), B (out, k) with B A the unscaled change; k = r, or 2r if a start is subtracted.

        B A - B0 A0 = (B - B0) A + B0 (A - A0). The differences are taken in float32: rounding the factors to
        bfloat16 for the product then keeps the start at exactly zero, and keeps small steps.
        """
        if self.A0 is None:
            return self.A, self.B
        assert self.B0 is not None  # both, or neither
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1)

    def to_peft(self, site: Site) -> PeftForm | None:
        """Returns plain LoRA on the untouched base: rank 2r at the same scaling if a start was subtracted.

        The setting `start_rank`, unknown to PEFT, then marks the layout of pair().
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
                f"{site.name}: PEFT's forward ignores this convolution's groups, dilation or padding mode,"
                f" so the trained adapter is not a change of its weight; train it again without this layer"
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
