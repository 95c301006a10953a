"""LoRA-FA: W' = W + s B A with A frozen at its start, B trained.  Zhang et al. 2023,
https://arxiv.org/abs/2308.03303

A is LoRA's start of that name; B starts at zero, whatever the start has for it. The gradient of B needs h = A
x alone, so the layer's input is not kept. With orthonormal rows of A (pissa) the correction of B's
gradient in PEFT's optimiser for it, (A A')^-1, is a multiple of the identity; AdamW is blind to it.

Parameters: r out a layer.
State: B and A.
Cost: LoRA's without the gradient of A; the backward keeps r numbers per token; merged: none.
Use: if activations limit the memory of a training.
Against: the change reads r fixed directions of the input. It learned less than LoRA of the same rank in
PEFT's comparison (40.4 against 47.8).
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.delta import Delta, FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.peft import PeftForm, PeftStored, peft_same_map, peft_tensors
from veneer.methods.base.stats import Stats
from veneer.methods.lora import LoRA
from veneer.sites import Site


@final
class LoRAFA(FactoredDelta, PeftStored):
    """B (out, r) starts at zero; A (r, in) is frozen."""

    roles = {"B": "B"}
    A: Tensor

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
        alpha: numerator of the scale s; the default is that of lora
        stabilised: s = alpha / sqrt(r) instead of alpha / r
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        init: start of A, as for lora
        init_options: options of the start by name, such as gamma=64
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        options: dict[str, Any] = dict(
            rank=rank, alpha=alpha, stabilised=stabilised, dropout=dropout, seed=seed
        )
        start = LoRA(site, stats, init=init, init_options=init_options, **options)
        self.dropout, self.stabilised, self.scaling = dropout, stabilised, start.scaling
        A = start.A.detach()
        if (
            site.kind == "embedding" and not A.any()
        ):  # LoRA's start for token ids: then A would stay zero for ever
            A = torch.randn(A.shape, generator=torch.Generator().manual_seed(seed)).to(A)
        self.register_buffer("A", A)
        self.B = nn.Parameter(torch.zeros(site.out, rank, dtype=master_dtype(site), device=site.device))

    def factors(self, site: Site) -> Factors:
        return Factors(self.A, self.scaling * self.B)

    def to_peft(self, site: Site) -> PeftForm | None:
        """Returns plain LoRA, as which it is read again."""
        if not peft_same_map(site):
            return None
        r = len(self.A)
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": self.scaling * (math.sqrt(r) if self.stabilised else r),
            "use_rslora": self.stabilised,
            "lora_dropout": self.dropout,
        }
        return PeftForm(config, peft_tensors(site, self.A, self.B.detach()))

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return False  # nothing in such a file tells it from LoRA's

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        return LoRA.from_peft(site, config, tensors)
