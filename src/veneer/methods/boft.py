"""BOFT: W' = s * (W R'), R a product of m butterfly rotations.  Liu et al. 2023,
https://arxiv.org/abs/2311.06243

Each factor rotates blocks of b numbers that a butterfly permutation brought together, so m factors mix 2^(m -
1) blocks. With one factor this is OFT with exact rotations and a gain s of every row. As in PEFT, Q = (P -
P') / 2 for a trained square P, and a rotation is (I - Q) (I + Q)^-1. PEFT drops all factors but one on a
machine without its CUDA extension; here they act everywhere.

Parameters: m in b, and out, a layer (half of P acts).
State: P and s.
Cost: m products of the input with blocks of side b in front of the layer, one multiplication per output;
merged: none.
Use: rotations across the whole input with few parameters.
Against: the exact transform solves in / b systems in every pass. It was the slowest but one of PEFT's
comparison, where it learned less than LoRA.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.methods.base.checks import check_divides
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_dims, check_peft_tensors
from veneer.methods.base.turning import Turning, turned_size
from veneer.ops.matrix import rotations
from veneer.sites import Site


@final
class BOFT(Turning, PeftStored):
    """P (m, n, b, b) starts at zero and s (out,) at one: no rotation."""

    roles = {"s": "gain"}
    peft_settings = {
        "boft_block_size": 4,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": 1,
        "boft_dropout": 0.0,
        "init_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
    }

    def __init__(self, site: Site, *, block: int = 4, factors: int = 1) -> None:
        """
        block: b, the side of a rotated block; even with several factors
        factors: m, the number of butterfly factors; b 2^(m - 1) divides `in` (`out` for embeddings)
        """
        super().__init__()
        if factors < 1 or block < 2 or (factors > 1 and block % 2):
            raise ConfigError(
                f"boft needs factors >= 1 and block >= 2, even with several factors; got factors={factors},"
                f" block={block}"
            )
        size, name = turned_size(site), "out" if site.kind == "embedding" else "in"
        what = "block" if factors == 1 else f"block x 2^{factors - 1} ="
        check_divides(what, block * 2 ** (factors - 1), {name: size}, site)
        dtype, device = master_dtype(site), site.device
        self.P = nn.Parameter(torch.zeros(factors, size // block, block, block, dtype=dtype, device=device))
        self.s = nn.Parameter(torch.ones(site.out, dtype=dtype, device=device))
        places = torch.stack([rotations.butterfly(size, block, level) for level in range(factors)])
        self.register_buffer("places", places.to(device), persistent=False)

    places: Tensor

    def turn(self, T: Tensor, strength: float, *, back: bool = False) -> Tensor:
        P = self.P if strength == 1 else strength * self.P
        D = rotations.cayley((P - P.mT) / 2).to(T.dtype)
        order = range(len(P)) if back else range(len(P) - 1, -1, -1)
        total = torch.zeros_like(T)
        for i in order:
            places = self.places[i]
            mixed = (T + total)[..., places.argsort()]
            total = total + rotations.turn(mixed, D[i].mT if back else D[i])[..., places]
        return total

    def gain(self, strength: float) -> Tensor | None:
        return self.s if strength == 1 else 1 + strength * (self.s - 1)

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind != "linear":
            return None
        config = {
            "peft_type": "BOFT",
            "boft_block_size": self.P.shape[-1],
            "boft_n_butterfly_factor": len(self.P),
        }
        return PeftForm(config, {"boft_R": self.P.detach(), "boft_s": self.s.detach()[:, None]})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "BOFT"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        check_peft_dims(site, tensors, {"boft_R": 4})
        factors, _, block, _ = tensors["boft_R"].shape
        delta = build(cls, site, {"block": block, "factors": factors})
        shapes = {"boft_R": tuple(delta.get_parameter("P").shape), "boft_s": (site.out, 1)}
        check_peft_tensors(site, tensors, shapes)
        with torch.no_grad():
            delta.get_parameter("P").copy_(tensors["boft_R"])
            delta.get_parameter("s").copy_(tensors["boft_s"][:, 0])
        return delta
