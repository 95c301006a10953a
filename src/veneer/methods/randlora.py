"""RandLoRA: W' = W + s sum_j B_j diag(l_j) A diag(g_j), A and B_j random and frozen.  Albert et al. 2025,
https://arxiv.org/abs/2502.00987

All layers share one random A and as many random B_j as make a full rank. Vectors are trained on both sides of
A: l_j (r,) and g_j (min,), with min = min(out, in). On a layer with out < in the product is transposed. s =
alpha / r.

Parameters: n (r + min) a layer, n = min / r rounded up: a larger rank has fewer.
State: l and g, and A and the B_j once for all layers (in PEFT's layout; elsewhere in every layer).
Cost: two more products of the layer's own size. Every layer holds its part of A and the B_j in memory, max x
min numbers;
merged: none.
Use: changes of full rank with few trained numbers.
Against: about three times the computation of the layer. It forgot the most but one in PEFT's comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import FormatError
from veneer.methods.base.checks import check_dropout, check_rank, scaling_of
from veneer.methods.base.delta import Delta, FactoredDelta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops.draws import unit_rows
from veneer.sites import Site


@final
class RandLoRA(FactoredDelta, PeftStored):
    """l (r, n) starts at zero, g (n, min) at 1 / min; A (r, min), B (max, n, r)."""

    roles = {"l": "factor", "g": "factor"}
    peft_settings = {
        "r": 32,
        "projection_prng_key": 0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
        "randlora_dropout": 0.0,
        "randlora_alpha": 640,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
    }
    A: Tensor
    B: Tensor

    def __init__(
        self, site: Site, *, rank: int = 32, alpha: float | None = None, dropout: float = 0.0, seed: int = 0
    ) -> None:
        """
        rank: r, at most min(out, in); a larger one trains fewer numbers
        alpha: s = alpha / r (default: 20 x rank)
        dropout: share of the adapter's inputs dropped in training; the base path keeps all
        seed: key of A and B, the same for all layers
        """
        super().__init__()
        check_rank(rank, site)
        check_dropout(dropout)
        self.dropout, self.scale = dropout, scaling_of(alpha, rank, default=20.0)
        least, most = sorted((site.out, site.in_))
        n, dtype, device = math.ceil(least / rank), master_dtype(site), site.device
        A = unit_rows(least, rank, seed, f"randlora A {rank}").mT
        B = torch.stack([unit_rows(most, rank, seed, f"randlora B {rank} {j}") for j in range(n)], 1)
        self.register_buffer("A", A.to(device, dtype).contiguous())
        self.register_buffer("B", B.to(device, dtype))
        self.l = nn.Parameter(torch.zeros(rank, n, dtype=dtype, device=device))
        self.g = nn.Parameter(torch.full((n, least), 1 / least, dtype=dtype, device=device))

    def factors(self, site: Site) -> Factors:
        """PEFT pairs column j r + i of the B_j side by side with row i n + j of the scaled A; so does
        this."""
        scaled = (self.l[:, :, None] * self.A[:, None] * self.g).flatten(0, 1)  # (r n, min)
        B = self.B.flatten(1)  # (max, n r)
        if site.in_ <= site.out:
            return Factors(scaled, self.scale * B)
        return Factors(B.mT, self.scale * scaled.mT)

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind not in ROWWISE:
            return None
        r = len(self.A)
        config = {
            "peft_type": "RANDLORA",
            "r": r,
            "randlora_alpha": self.scale * r,
            "randlora_dropout": self.dropout,
            "projection_prng_key": self.options["seed"],
        }
        tensors = {"randlora_lambda": self.l.detach(), "randlora_gamma": self.g.detach()}
        return PeftForm(config, tensors, {"randlora_A": self.A[:, None], "randlora_B": self.B})

    @classmethod
    def peft_room(cls, sites: Sequence[Site], config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        r = config["r"]
        least, most = sorted((max(s.out for s in sites), max(s.in_ for s in sites)))
        return {"randlora_A": (r, 1, least), "randlora_B": (most, math.ceil(least / r), r)}

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "RANDLORA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        if not {"randlora_A", "randlora_B"} <= tensors.keys():
            raise FormatError(
                f"{site.name}: randlora_A and randlora_B are missing in the file, and another machine's draw"
                f" cannot be repeated; save it in PEFT with save_projection=True"
            )
        r = config["r"]
        least, most = sorted((site.out, site.in_))
        n = math.ceil(least / r)
        given: dict[str, Tensor] = {
            k: tensors[k] for k in ("randlora_lambda", "randlora_gamma") if k in tensors
        }
        given |= {
            "randlora_A": tensors["randlora_A"][:r, 0, :least],
            "randlora_B": tensors["randlora_B"][:most, :n, :r],
        }
        shapes: dict[str, tuple[int, ...]] = {"randlora_lambda": (r, n), "randlora_gamma": (n, least)}
        check_peft_tensors(site, given, {**shapes, "randlora_A": (r, least), "randlora_B": (most, n, r)})
        options = {"rank": r, "alpha": float(config["randlora_alpha"]), "dropout": config["randlora_dropout"]}
        delta = build(cls, site, {**options, "seed": config["projection_prng_key"]})
        with torch.no_grad():
            for ours, theirs in {"l": "lambda", "g": "gamma"}.items():
                delta.get_parameter(ours).copy_(given[f"randlora_{theirs}"])
            for name in ("A", "B"):
                delta.get_buffer(name).copy_(given[f"randlora_{name}"])
        return delta
