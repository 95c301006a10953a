"""LoHa: W' = W + s (B1 A1) * (B2 A2), number by number, s = alpha / r.  Hyeon-Woo et al. 2021,
https://arxiv.org/abs/2108.06098

The product of two low-rank matrices, number by number, has rank r^2 at most (FedPara). It equals a plain pair
whose rows and columns are products: B[o, ij] = B1[o, i] B2[o, j], A[ij, n] = A1[i, n] A2[j, n]. B2 A2 starts
at zero.

Parameters: 2 r (in + out) a layer.
State: A1, B1, A2, B2.
Cost: a LoRA of rank r^2 while its factors are smaller than W. Above that every pass builds W' - W, and the
backward builds it again; merged: none.
Use: adapters of image models (LyCORIS); a change of higher rank than LoRA's at the same size.
Against: at r^2 near the width as expensive as another layer. Its numbers are products of four, so it wants a
larger rate than LoRA's. Published comparisons use one rate for both.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_rank, scaling_of
from veneer.methods.base.delta import Delta, DenseDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors, peft_core, peft_dense_map
from veneer.methods.base.protocols import Served
from veneer.ops.draws import keyed
from veneer.sites import Site

PEFT_NAMES = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}


@final
class LoHa(DenseDelta, Served, PeftStored):
    """A1, A2 (r, in) and B1, B2 (out, r); He's uniform start (the paper's), A2 zero."""

    roles = {"A1": "A", "B1": "B", "A2": "A2", "B2": "B2"}
    peft_settings = {
        "r": 8,
        "alpha": 8,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "init_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }

    def __init__(self, site: Site, *, rank: int = 8, alpha: float | None = None, seed: int = 0) -> None:
        """
        rank: r, at most min(out, in)
        alpha: s = alpha / r (default: s = 1)
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_rank(rank, site)
        self.scale = scaling_of(alpha, rank, default=1.0)
        draw, like = keyed(seed, site.key), torch.empty((), dtype=master_dtype(site), device=site.device)

        def uniform(rows: int, columns: int) -> nn.Parameter:
            t = (2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(columns)
            return nn.Parameter(t.to(like))

        self.B1, self.A1 = uniform(site.out, rank), uniform(rank, site.in_)
        self.B2, self.A2 = uniform(site.out, rank), nn.Parameter(like.new_zeros(rank, site.in_))

    def factors(self, site: Site) -> Factors:
        A = (self.A1[:, None] * self.A2).flatten(0, 1)  # (r^2, in)
        B = (self.B1[:, :, None] * self.B2[:, None]).flatten(1)  # (out, r^2)
        return Factors(A, self.scale * B)

    def delta(self, site: Site) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)

    def normal_form(self, site: Site) -> Factors | None:
        is_small = len(self.A1) ** 2 * (site.out + site.in_) <= site.out * site.in_
        return self.factors(site) if is_small and site.kind in ROWWISE else None

    def to_peft(self, site: Site) -> PeftForm | None:
        if not peft_dense_map(site):
            return None
        r = len(self.A1)
        tensors = {theirs: self.get_parameter(ours).detach() for ours, theirs in PEFT_NAMES.items()}
        return PeftForm({"peft_type": "LOHA", "r": r, "alpha": self.scale * r}, tensors)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LOHA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        r = config["r"]
        for k in ("1", "2"):
            if f"hada_t{k}" in tensors:
                names = (f"hada_t{k}", f"hada_w{k}_a", f"hada_w{k}_b")
                tensors |= peft_core(site, tensors, names, (r, site.out, site.in_))
        shapes: dict[str, tuple[int, ...]]
        shapes = {n: (site.out, r) if n.endswith("a") else (r, site.in_) for n in PEFT_NAMES.values()}
        check_peft_tensors(site, tensors, shapes)
        delta = build(cls, site, {"rank": r, "alpha": float(config["alpha"])})
        with torch.no_grad():
            for ours, theirs in PEFT_NAMES.items():
                delta.get_parameter(ours).copy_(tensors[theirs])
        return delta
