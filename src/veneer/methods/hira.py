"""HiRA: W' = W * (1 + B A), number by number.  Huang et al. 2025, https://openreview.net/forum?id=TwJrTz9cRS

A low-rank matrix multiplies the numbers of W, so the change W * (B A) has a rank far above r.

Parameters: r (in + out) a layer.
State: A and B.
Cost: every pass builds W * (B A), and the backward builds it again. A bank serves it by r products with W of
each row's own inputs; merged: none.
Use: a change of high rank with few parameters.
Against: a weight near zero cannot move, and the change follows the size of W. It wants a far larger rate than
LoRA (4.5e-3 in PEFT's comparison, where it learned more and forgot more). Other bases do not take the adapter
over.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_dropout, check_rank
from veneer.methods.base.delta import Delta, DenseDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors, Products
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors, peft_flat
from veneer.methods.base.protocols import Served
from veneer.ops.draws import keyed
from veneer.sites import Site


@final
class HiRA(DenseDelta, Served, PeftStored):
    """A (r, in) uniform in +-1/sqrt(in) and B (out, r) zero; for token ids A zero and B normal."""

    roles = {"A": "A", "B": "B"}
    peft_settings = {
        "r": 32,
        "hira_dropout": 0.0,
        "init_weights": True,
        "fan_in_fan_out": False,
        "rank_pattern": {},
    }

    def __init__(self, site: Site, *, rank: int = 32, dropout: float = 0.0, seed: int = 0) -> None:
        """
        rank: r, at most min(out, in)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_rank(rank, site)
        check_dropout(dropout)
        self.dropout = dropout
        draw, like = keyed(seed, site.key), torch.empty((), dtype=master_dtype(site), device=site.device)
        A, B = torch.zeros(rank, site.in_), torch.zeros(site.out, rank)
        if site.kind == "embedding":
            B = torch.randn(site.out, rank, generator=draw)
        else:
            A = (2 * torch.rand(rank, site.in_, generator=draw) - 1) / math.sqrt(site.in_)
        self.A, self.B = nn.Parameter(A.to(like)), nn.Parameter(B.to(like))

    def delta(self, site: Site) -> Tensor:
        return site.weight().to(self.A.dtype) * (self.B @ self.A)

    def normal_form(self, site: Site) -> Factors | None:
        return None

    def products(self, site: Site) -> Products | None:
        """Returns W x + sum_k B_k * W (A_k * x)."""
        if site.kind not in ROWWISE or (self.training and self.dropout):
            return None
        return Products(self.B.new_ones(site.out), self.A, self.B.mT)

    def to_peft(self, site: Site) -> PeftForm | None:
        names = _peft_names(site)
        if names is None:
            return None
        config = {"peft_type": "HIRA", "r": len(self.A), "hira_dropout": self.dropout}
        return PeftForm(config, dict(zip(names, (self.A.detach(), self.B.detach()), strict=True)))

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "HIRA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        rank = config["r"]
        names = _peft_names(site) or ("hira_A", "hira_B")
        given = {n: peft_flat(tensors[n]) for n in names if n in tensors}
        check_peft_tensors(site, given, {names[0]: (rank, site.in_), names[1]: (site.out, rank)})
        delta = build(cls, site, {"rank": rank, "dropout": config["hira_dropout"]})
        with torch.no_grad():
            for ours, theirs in zip(("A", "B"), names, strict=True):
                delta.get_parameter(ours).copy_(given[theirs])
        return delta


def _peft_names(site: Site) -> tuple[str, str] | None:
    """Returns PEFT's names of A and B on this layer, or None if Veneer keeps it in its own layout."""
    if site.kind == "embedding" and getattr(site.module, "embed_scale", None) is None:
        return "hira_embedding_A", "hira_embedding_B"
    return ("hira_A", "hira_B") if site.kind in ROWWISE else None
