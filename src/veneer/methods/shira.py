"""SHiRA: W' = W + S, S zero but for n trained numbers at fixed random places.  Bhardwaj et al. 2024,
https://arxiv.org/abs/2406.13175

Parameters: n = r (in + out) a layer, as many as a LoRA of rank r, or any other n.
State: the numbers and their places.
Cost: every pass builds S as a matrix and multiplies by it like by another weight; the backward builds it
again. Merged: none, and an exchange of merged adapters writes n numbers.
Use: many adapters on one base that interfere little: two random sets of places share almost none.
Against: slower than LoRA in training, at the cost of another layer; S has no low rank.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ShapeError
from veneer.methods.base.checks import check_rank
from veneer.methods.base.delta import Delta, DenseDelta, master_dtype
from veneer.methods.base.options import build
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_at_most
from veneer.sites import Site


@final
class SHiRA(DenseDelta, PeftStored):
    """v (n,) starts at zero; places (n,) are row * in + column."""

    peft_settings = {
        "r": 32,
        "mask_type": "random",
        "random_seed": None,
        "init_weights": True,
        "fan_in_fan_out": False,
    }
    places: Tensor

    def __init__(self, site: Site, *, rank: int = 8, numbers: int | None = None, seed: int = 0) -> None:
        """
        rank: r, for as many numbers as a LoRA of this rank, at most those of W
        numbers: n, in place of a rank
        seed: key of the places, together with the layer's name
        """
        super().__init__()
        n, most = rank * (site.in_ + site.out), site.in_ * site.out
        if numbers is not None:
            check_at_most(numbers, most, "in out", site.name, "numbers")
            n = numbers
        else:
            check_rank(rank, site)
        if n > most:
            raise ShapeError(
                f"rank {rank} asks for {n} numbers, W has {most} at {site.name!r};"
                f" use at most {most // (site.in_ + site.out)}, or exclude the layer"
            )
        places = torch.randperm(most, generator=keyed(seed, site.key))[:n].sort().values
        self.register_buffer("places", places.to(site.device))
        self.v = nn.Parameter(torch.zeros(n, dtype=master_dtype(site), device=site.device))

    def delta(self, site: Site) -> Tensor:
        flat = self.v.new_zeros(site.out * site.in_).index_copy(0, self.places, self.v)
        return flat.view(site.out, site.in_)

    def to_peft(self, site: Site) -> PeftForm | None:
        if site.kind != "linear" or len(self.v) % (site.in_ + site.out):
            return None
        rows, columns = self.places // site.in_, self.places % site.in_
        tensors = {"shira_weight": self.v.detach(), "shira_indices": torch.stack([rows, columns]).int()}
        rank = len(self.v) // (site.in_ + site.out)
        return PeftForm({"peft_type": "SHIRA", "r": rank}, tensors)

    @classmethod
    def holding(cls, site: Site, places: Tensor, v: Tensor) -> Delta:
        """Returns the change with the numbers v (n,) at places (n,), row * in + column, in any order."""
        delta = build(cls, site, {"numbers": len(v)})
        with torch.no_grad():
            delta.get_buffer("places").copy_(places)
            delta.get_parameter("v").copy_(v)
        return delta

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "SHIRA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        n = config["r"] * (site.in_ + site.out)
        check_peft_tensors(site, tensors, {"shira_weight": (n,), "shira_indices": (2, n)})
        delta = build(cls, site, {"rank": config["r"]})
        rows, columns = tensors["shira_indices"].long()
        with torch.no_grad():
            delta.get_buffer("places").copy_(rows * site.in_ + columns)
            delta.get_parameter("v").copy_(tensors["shira_weight"])
        return delta
