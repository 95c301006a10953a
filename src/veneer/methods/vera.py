"""VeRA: W' = W + diag(b) B diag(d) A, A and B random and frozen.  Kopiczko et al. 2023,
https://arxiv.org/abs/2310.11454

All layers share one random A and one random B and use as many of their columns and rows as they have. One
vector on each side is trained. A and B have variance 1, and d is scaled by 2 / sqrt(in r), Kaiming's scale
for the width of each layer. PEFT scales all layers by the widest one.

Parameters: r + out a layer.
State: b and d, and A and B once for all layers (in PEFT's layout; beside changes that PEFT cannot express, in
every layer).
Cost: a LoRA of the same rank, which is large here, without the gradients of its factors. The backward keeps r
numbers per token. Every layer holds its part of A and B in memory; merged: none.
Use: many adapters of one base with small files.
Against: as much computation as a LoRA of a rank far above the usual one. Random directions are not those of
the data: a larger rate and more steps are needed.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import FormatError
from veneer.methods.base.checks import check_dropout, check_free_rank
from veneer.methods.base.delta import Delta, FactoredDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops.draws import unit_rows
from veneer.sites import Site


@final
class VeRA(FactoredDelta, PeftStored):
    """b (out,) starts at zero, d (r,) at `start`."""

    peft_settings = {
        "r": 256,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }
    A: Tensor
    B: Tensor

    def __init__(
        self, site: Site, *, rank: int = 256, start: float = 0.1, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """
        rank: r, of any size
        start: initial value of d; 0.1 and less do best in the paper
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: key of A and B, the same for all layers
        """
        super().__init__()
        check_free_rank(rank, site)
        check_dropout(dropout)
        self.dropout, self.scale = dropout, 2 / math.sqrt(site.in_ * rank)
        dtype, device = master_dtype(site), site.device
        A, B = (
            unit_rows(n, rank, seed, f"vera {which} {rank}")
            for which, n in (("A", site.in_), ("B", site.out))
        )
        self.register_buffer("A", A.mT.to(device, dtype).contiguous())
        self.register_buffer("B", B.to(device, dtype))
        self.b = nn.Parameter(torch.zeros(site.out, dtype=dtype, device=device))
        self.d = nn.Parameter(torch.full((rank,), float(start), dtype=dtype, device=device))

    def factors(self, site: Site) -> Factors:
        return Factors(self.A, self.b[:, None] * self.B * (self.scale * self.d))

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind not in ROWWISE:
            return None
        config = {
            "peft_type": "VERA",
            "r": len(self.d),
            "vera_dropout": self.dropout,
            "d_initial": self.options["start"],
        }
        config |= {"projection_prng_key": self.options["seed"], "own_scale": self.scale}
        tensors = {"vera_lambda_b": self.b.detach(), "vera_lambda_d": self.scale * self.d.detach()}
        return PeftForm(config, tensors, {"vera_A": self.A, "vera_B": self.B})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "VERA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        r = config["r"]
        if not {"vera_A", "vera_B"} <= tensors.keys():
            raise FormatError(
                f"{site.name}: vera_A and vera_B are missing in the file, and another machine's draw"
                f" cannot be repeated; save it in PEFT with save_projection=True"
            )
        check_peft_tensors(site, tensors, {"vera_lambda_b": (site.out,), "vera_lambda_d": (r,)})
        A, B = tensors["vera_A"][:r, : site.in_], tensors["vera_B"][: site.out, :r]
        check_peft_tensors(
            site, {"vera_A": A, "vera_B": B}, {"vera_A": (r, site.in_), "vera_B": (site.out, r)}
        )
        options = {
            "start": config["d_initial"],
            "dropout": config["vera_dropout"],
            "seed": config["projection_prng_key"],
        }
        delta = build(cls, site, {"rank": r, **options})
        assert isinstance(delta, cls)
        delta.scale = config.get("own_scale", 1.0)
        with torch.no_grad():
            delta.A.copy_(A)
            delta.B.copy_(B)
            delta.b.copy_(tensors["vera_lambda_b"])
            delta.d.copy_(tensors["vera_lambda_d"] / delta.scale)
        return delta
