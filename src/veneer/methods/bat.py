"""Bat: W'_ij = W_ij + W_ij B_i + B_i for every tile W_ij (r, r) of W.  Kang & Yin 2024,
https://arxiv.org/abs/2409.15371

W is cut into square tiles. All tiles of one row of tiles share one block B_i. The paper's first three
versions call this method Bone, its later ones Bat, and both use Bone for another method (see miss): a
published number for "Bone" may mean either. PEFT has it as MiSS with init_weights "bat".

Parameters: r x out a layer, as many as MiSS of that rank.
State: B.
Cost: every pass builds W' - W by out x in x r products and multiplies by it like by another weight. The
backward builds it again instead of keeping it; merged: none. A quantised W is unpacked in every pass.
Use: to repeat results published under that name. The change has full rank, but depends on W itself.
Against: no comparison at learning rates tuned for each method; r must divide both sides of every layer.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.methods.base.checks import check_divides, check_rank
from veneer.methods.base.delta import Delta, DenseDelta, master_dtype
from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops import recomputed
from veneer.ops.matrix.tiles import affine
from veneer.sites import Site


@final
class Bat(DenseDelta, PeftStored):
    """B (out / r, r, r), one block for every row of tiles, starts at zero."""

    peft_settings = {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"}

    def __init__(self, site: Site, *, rank: int = 64) -> None:
        """
        rank: r, the side of a tile; a divisor of `in` and `out`
        """
        super().__init__()
        check_rank(rank, site)
        check_divides("rank", rank, {"in": site.in_, "out": site.out}, site)
        blocks = torch.zeros(site.out // rank, rank, rank, dtype=master_dtype(site), device=site.device)
        self.B = nn.Parameter(blocks)

    def delta(self, site: Site) -> Tensor:
        return affine(site.weight().to(self.B.dtype), self.B)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.kind not in ROWWISE:
            return super().forward(x, y, site)

        if site.trains:
            return recomputed.product(
                x.to(y.dtype), lambda B, W: affine(W.to(y.dtype), B.to(y.dtype)), (self.B, site.weight())
            )

        def change(B: Tensor) -> Tensor:
            return affine(site.weight().detach().to(y.dtype), B.to(y.dtype))

        return recomputed.product(x.to(y.dtype), change, (self.B,))

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind != "linear":
            return None
        config = {
            "peft_type": "MISS",
            "r": self.options["rank"],
            "miss_dropout": 0.0,
            "mini_r": 1,
            "init_weights": "bat",
        }
        return PeftForm(config, {"miss_block": self.B.detach()})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "MISS" and config.get("init_weights") == "bat"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        r = config["r"]
        delta = build(cls, site, {"rank": r})
        check_peft_tensors(site, tensors, {"miss_block": (site.out // r, r, r)})
        with torch.no_grad():
            delta.get_parameter("B").copy_(tensors["miss_block"])
        return delta
