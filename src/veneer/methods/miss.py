"""MiSS: W' = W + D A with A = [I I .. I], the identity of size r laid side by side.  Kang & Yin 2024, https://arxiv.org/abs/2409.15371

The column variant that PEFT ships: the input is cut into pieces of r numbers, the pieces are added up, and D (out, r) reads
the sum. It is LoRA with a frozen A of zeros and ones; r need not divide the width. With `mini` the rows of D repeat: row o
is row o mod mini of the trained ones. (The paper's first versions called this, and another method, Bone: see bat.)

Parameters: r x out a layer, or r x mini; a LoRA of half the rank has as many in all.
State: D alone; A follows from the shapes.
Cost: the products of a LoRA of this rank without a gradient of A, so that training keeps r numbers a token of the layer's
input for the backward instead of all; merged: none.
Use: where the memory of activations is what limits a training.
Against: the paper compares all methods at one learning rate, at which MiSS moves the weights several times as far as
LoRA in its first steps; a sweep for each method has not been published. Rank at most r, as LoRA's.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, ShapeError
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
        mini: trained rows of D, which repeat over the outputs; a divisor of `out`
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        """
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {dropout}")
        check_at_most(rank, site.in_, "in", site.name)
        if mini is not None and (mini < 1 or site.out % mini):
            raise ShapeError(
                f"mini {mini} does not divide out = {site.out} at {site.name!r}; use a divisor, or leave it out"
            )
        self.dropout = dropout
        dtype, device = master_dtype(site), site.device
        self.D = nn.Parameter(torch.zeros(mini or site.out, rank, dtype=dtype, device=device))
        places = torch.arange(site.in_, device=device) % rank
        self.register_buffer(
            "A", nn.functional.one_hot(places, rank).mT.to(dtype).contiguous(), persistent=False
        )

    def factors(self, site: Site) -> Factors:
        return Factors(
            self.A, self.D.repeat(site.out // self.D.shape[0], 1) if self.D.shape[0] < site.out else self.D
        )

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
