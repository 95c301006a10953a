"""MiSS: W' = W + D A with A = [I I .. I], the identity of size r laid side by side.  Kang & Yin 2024,
https://arxiv.org/abs/2409.15371

This is the column variant, as in PEFT: the input is cut into pieces of r numbers, the pieces are summed, and
D (out, r) reads the sum. It equals a LoRA with a frozen A of zeros and ones; r need not divide the width.
With `mini` the rows of D repeat: row o is row o mod mini of the trained ones. The paper's first versions used
the name Bone for this method and for another one (see bat).

Parameters: r x out a layer, or r x mini; about as many as a LoRA of half the rank.
State: D; A follows from the shapes.
Cost: the products of a LoRA of this rank without A's gradient, so the backward keeps r numbers per token
instead of the layer's whole input; merged: none.
Use: if activations limit the memory of a training.
Against: the paper compares all methods at one learning rate, at which MiSS moves the weights several times as
far as LoRA in its first steps; a sweep for each method is not published. The change has rank r at most, as
LoRA's.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_divides, check_dropout
from veneer.methods.base.delta import Delta, FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops.matrix.linalg import check_at_most
from veneer.sites import Site


@final
class MiSS(FactoredDelta, PeftStored):
    """D (out, r), or (mini, r), starts at zero."""

    peft_settings = {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"}
    A: Tensor

    def __init__(self, site: Site, *, rank: int = 64, mini: int | None = None, dropout: float = 0.0) -> None:
        """
        rank: r, the length of a piece of the input, at most `in`
        mini: number of trained rows of D, which repeat over the outputs; a divisor of `out` (default: out)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        """
        super().__init__()
        check_dropout(dropout)
        check_at_most(rank, site.in_, "in", site.name)
        if mini is not None:
            check_divides("mini", mini, {"out": site.out}, site)
        self.dropout = dropout
        dtype, device = master_dtype(site), site.device
        self.D = nn.Parameter(torch.zeros(mini or site.out, rank, dtype=dtype, device=device))
        places = torch.arange(site.in_, device=device) % rank
        self.register_buffer(
            "A", nn.functional.one_hot(places, rank).mT.to(dtype).contiguous(), persistent=False
        )

    def factors(self, site: Site) -> Factors:
        rows = len(self.D)
        return Factors(self.A, self.D if rows == site.out else self.D.repeat(site.out // rows, 1))

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind != "linear":
            return None
        mini = self.options["mini"]
        config = {
            "peft_type": "MISS",
            "r": self.D.shape[1],
            "miss_dropout": self.dropout,
            "mini_r": mini or 1,
        }
        return PeftForm(
            {**config, "init_weights": "mini" if mini else True}, {"miss_block": self.D.detach().mT}
        )

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "MISS" and config.get("init_weights") != "bat"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        mini = config["mini_r"] if config["init_weights"] == "mini" else None
        delta = build(cls, site, {"rank": config["r"], "mini": mini, "dropout": config["miss_dropout"]})
        check_peft_tensors(site, tensors, {"miss_block": (config["r"], mini or site.out)})
        with torch.no_grad():
            delta.get_parameter("D").copy_(tensors["miss_block"].mT)
        return delta
