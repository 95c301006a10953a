"""DoRA: W' = m * (W + s B A) / ||W + s B A||, norms of rows.  Liu et al. 2024,
https://arxiv.org/abs/2402.09353

B A turns each row of the weight, m sets its length.

Parameters: LoRA's, and out.
State: LoRA's, and m.
Cost: LoRA's, and a product W A' of rank r in every pass for the norms, whatever the number of tokens;
merged: none.
Use: in place of LoRA at low ranks, where the paper finds most of its gain.
Against: slower than LoRA in training. The change has full rank, so converting it to plain LoRA truncates it.
vLLM does not read it. Variants of LoRA with tuned learning rates ended within 1 to 2 % of each other
(https://arxiv.org/abs/2602.04998).
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors, peft_shapes
from veneer.methods.base.protocols import FollowsBase, SubtractsStart
from veneer.methods.base.stats import Stats
from veneer.methods.lora import LoRA
from veneer.ops.lowrank import is_traced
from veneer.ops.matrix.linalg import row_norms, row_norms_of_sum
from veneer.sites import Site


@final
class DoRA(FactoredDelta, SubtractsStart, FollowsBase, PeftStored):
    """A LoRA pair and a magnitude m (out,). The norm is a constant in the backward (section 4.3 of the
    paper)."""

    roles = {"A": "A", "B": "B", "m": "magnitude"}
    norms: Tensor

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
        stabilised: s = alpha / sqrt(r) instead of alpha / r
        dropout: share of the low-rank branch's inputs dropped in training
        init: start of A and B: kaiming, gaussian, pissa, olora, orthogonal; loraga needs the loss's gradient;
        qpissa and loftq need a quantised base
        init_options: options of the start by name, such as gamma=64
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        pair: dict[str, Any] = dict(
            rank=rank, alpha=alpha, stabilised=stabilised, dropout=dropout, init=init, seed=seed
        )
        self._hold(site, LoRA(site, stats, init_options=init_options, **pair))

    def _hold(self, site: Site, lora: LoRA) -> None:
        self.lora, self.dropout = lora, lora.dropout
        norms = row_norms(site.weight().detach()).to(master_dtype(site))
        start = norms
        # A start that replaces the quantisation error acts from the first step on.
        if lora.A0 is None and not lora.B.is_meta and bool(lora.B.any()):
            low = lora.factors(site)
            start = row_norms_of_sum(site.weight(), norms.square(), low.A.detach(), low.B.detach())
        self.m = nn.Parameter(start.clone())
        self.register_buffer("norms", norms, persistent=False)
        self.stamp = site.stamp()

    def refresh(self, site: Site) -> None:
        self.norms = row_norms(site.weight().detach()).to(self.norms)
        self.stamp = site.stamp()

    def base_norms(self, site: Site) -> Tensor:
        """Returns ||W|| by row; computed in every pass if W trains, else only after W was written to."""
        if site.trains:
            return row_norms(site.weight().detach()).to(self.norms.dtype)
        stamp = None if is_traced() else site.stamp()
        if stamp is not None and stamp != self.stamp:
            self.refresh(site)
        return self.norms

    def factors(self, site: Site) -> Factors:
        low = self.lora.factors(site)
        with torch.no_grad():
            norm = row_norms_of_sum(site.weight(), self.base_norms(site).square(), low.A, low.B)
        safe = torch.where(norm > 0, norm, 1)  # a row of zeros (a padding token) stays one
        return Factors(low.A, low.B, torch.where(norm > 0, self.m / safe, 1))

    def taken(self) -> Factors | None:
        return self.lora.taken()

    def to_peft(self, site: Site) -> PeftForm | None:
        form = self.lora.to_peft(site)
        if form is None:
            return None
        m = self.m.detach().reshape(peft_magnitude(site)["lora_magnitude_vector"])
        return PeftForm({**form.config, "use_dora": True}, {**form.tensors, "lora_magnitude_vector": m})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LORA" and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> DoRA:
        check_peft_tensors(site, tensors, {**peft_shapes(site, config["r"]), **peft_magnitude(site)})
        delta = cls.__new__(cls)  # as LoRA.holding, without a start
        nn.Module.__init__(delta)
        delta._hold(site, LoRA.from_peft(site, config, tensors))
        delta.options = delta.lora.options
        with torch.no_grad():
            delta.m.copy_(tensors["lora_magnitude_vector"].flatten())
        return delta


def peft_magnitude(site: Site) -> dict[str, tuple[int, ...]]:
    """Returns PEFT's name and shape of the magnitudes: (out,), or (1, out, 1, ..) for a convolution."""
    return {"lora_magnitude_vector": (1, site.out, *(1,) * site.spatial) if site.spatial else (site.out,)}
