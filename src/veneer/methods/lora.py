"""LoRA: W' = W + s (B A - B0 A0), s = alpha / r.  Hu et al. 2021, https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods import inits
from veneer.methods.base import Delta, Factors, PeftForm, master_dtype
from veneer.ops.draws import keyed
from veneer.ops.linalg import check_rank
from veneer.sites import Site

# PEFT's names for starts whose own file needs the base changed to W - s B0 A0 before it means anything.
PEFT_SHIFTED_STARTS = ("pissa", "olora", "corda", "kasa", "lora_ga", "loftq")


class LoRA(Delta):
    """A (r, in) and B (out, r). A start with B0 A0 != 0 (PiSSA, OLoRA) is kept and subtracted: W is never written."""

    roles = {"A": "A", "B": "B"}

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        stabilised: bool = False,
        dropout: float = 0.0,
        init: str = "kaiming",
        seed: int = 0,
    ) -> None:
        """
        rank: r, at most min(out, in)
        alpha: scale numerator; 2 x rank unless given, rank for pissa and olora
        stabilised: s = alpha / sqrt(r) instead of alpha / r (rsLoRA, https://arxiv.org/abs/2312.03732)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        init: how A and B start: kaiming, gaussian, pissa or olora
        seed: draws are keyed by (seed, layer name)
        """
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {dropout}")
        check_rank(rank, site.weight(), site.name)
        chosen = inits.get(init)
        self.alpha = float(alpha if alpha is not None else chosen.ALPHA * rank)
        self.stabilised, self.dropout = stabilised, dropout
        self.scaling = self.alpha / (math.sqrt(rank) if stabilised else rank)
        W = site.weight().detach().to(master_dtype(site))
        A, B = chosen.start(inits.Start(W, rank, self.scaling, keyed(seed, site.name), site.kind == "embedding"))
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        shifted = bool(A.any()) and bool(B.any())
        self.register_buffer("A0", A.clone() if shifted else None)
        self.register_buffer("B0", B.clone() if shifted else None)

    def factors(self, site: Site) -> Factors:
        A, B = self.pair()
        return Factors(A, self.scaling * B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (k, in), B (out, k) with B A the unscaled change; k = r, or 2r where a start is subtracted.

        B A - B0 A0 = (B - B0) A + B0 (A - A0): the differences are taken in float32, so that neither the start
        (exactly zero) nor a small step is lost when the factors are rounded to bfloat16 for the product.
        """
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], 1)

    def to_peft(self, site: Site) -> PeftForm | None:
        """Plain LoRA on the untouched base; rank 2r with the same scaling where a start was subtracted."""
        if not site.factored:
            return None  # PEFT's grouped convolution is another map (its A reads all groups)
        A, B = self.pair()
        same = self.A0 is None
        config = {
            "peft_type": "LORA",
            "r": A.shape[0],
            "lora_alpha": self.alpha if same else self.scaling * A.shape[0],
            "use_rslora": self.stabilised and same,
            "lora_dropout": self.dropout,
        }
        return PeftForm(config, peft_tensors(site, A.detach(), B.detach()))

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and not config.get("use_dora")

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> LoRA:
        delta = cls(site, **peft_options(config))
        A, B = peft_pair(site, tensors)
        with torch.no_grad():
            delta.A.copy_(A)
            delta.B.copy_(B)
        return delta


def peft_options(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT's settings of one site in our words."""
    return {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "stabilised": bool(config.get("use_rslora")),
        "dropout": config.get("lora_dropout", 0.0),
    }


def peft_tensors(site: Site, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A and B under PEFT's names and in its shapes."""
    if site.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    return {"lora_A.weight": site.pack(A), "lora_B.weight": B[(...,) + (None,) * site.spatial]}


def peft_pair(site: Site, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) from PEFT's tensors of one site."""
    names = ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    A, B = (tensors[n] for n in names)
    return A.flatten(1), B.flatten(1)
