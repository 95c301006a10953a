"""HRA: W' = W H, H the product of reflections I - 2 u u' of r unit vectors.  Yuan et al. 2024,
https://arxiv.org/abs/2405.17484

The product has a compact form, H = I - U T U' with T^-1 = I / 2 + the strict upper triangle of U'U for unit
columns U. So the change -(W U T) U' has rank r: it is computed and served like a LoRA whose B follows from W.
Columns start in equal pairs, whose reflections cancel, so r is even. PEFT builds H and W H, as large as W, in
every pass.

Parameters: r in a layer, half a LoRA's on a square one.
State: the columns u, of any length.
Cost: a LoRA of rank r, and a product W U of rank r in every pass, whatever the number of tokens. A quantised
W is unpacked in every pass; merged: none.
Use: rotations, which keep the angles between a layer's rows, at LoRA's cost.
Against: W' stays a rotation of W. The paper's regulariser of U'U (its rates 1e-5 to 1e-3) is not part of this
method, as in PEFT.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ShapeError
from veneer.methods.base.checks import check_rank
from veneer.methods.base.delta import FactoredDelta, master_dtype
from veneer.methods.base.factors import Factors
from veneer.methods.base.peft import PeftForm, PeftStored, check_peft_tensors
from veneer.ops.draws import keyed
from veneer.sites import Site


@final
class HRA(FactoredDelta, PeftStored):
    """U (in, r), r / 2 uniform columns, each twice: the start is the base to rounding."""

    roles = {"U": "direction"}
    peft_settings = {"r": 8, "apply_GS": False, "init_weights": True, "bias": "none"}

    def __init__(self, site: Site, *, rank: int = 8, seed: int = 0) -> None:
        """
        rank: r, even, at most min(out, in)
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_rank(rank, site)
        if rank % 2:
            raise ShapeError(f"rank must be even for hra, got {rank}; reflections start in pairs that cancel")
        half = 2 * torch.rand(site.in_, rank // 2, generator=keyed(seed, site.key)) - 1
        self._hold(site, half.repeat_interleave(2, 1) / math.sqrt(rank // 2))

    def _hold(self, site: Site, U: Tensor) -> None:
        self.U = nn.Parameter(U.to(site.device, master_dtype(site), copy=True))

    def factors(self, site: Site) -> Factors:
        U = self.U / self.U.norm(dim=0)
        inverse = (U.mT @ U).triu(1) + 0.5 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        WU = site.weight().to(U.dtype) @ U
        B = torch.linalg.solve_triangular(inverse, -WU, upper=True, left=False)  # -W U T
        return Factors(U.mT, B)

    def to_peft(self, site: Site) -> PeftForm | None:
        if not _same_in_peft(site):
            return None
        return PeftForm({"peft_type": "HRA", "r": self.U.shape[1]}, {"hra_u": self.U.detach()})

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "HRA"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> HRA:
        """With apply_GS PEFT makes the columns orthogonal; reflections of orthogonal columns are this
        method's."""
        rank = config["r"]
        check_peft_tensors(site, tensors, {"hra_u": (site.in_, rank)})
        U = tensors["hra_u"]
        if config["apply_GS"]:
            U = torch.linalg.qr(U.double()).Q.to(
                U.dtype
            )  # up to signs, which a reflection does not depend on
        delta = cls.__new__(cls)  # __init__ takes even ranks alone
        nn.Module.__init__(delta)
        delta._hold(site, U)
        delta.options = {"rank": rank, "seed": 0}
        return delta


def _same_in_peft(site: Site) -> bool:
    """True if PEFT's forward is W H on this layer: linear, or a 2-D convolution with one kernel size and
    padding."""
    if site.kind != "conv":
        return site.kind == "linear"
    conv = site.module
    alike = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride))
    padded = len(set(conv.padding)) == 1 and conv.padding_mode == "zeros"  # not a word such as "same"
    return site.spatial == 2 and alike and padded and conv.groups == 1 and set(conv.dilation) == {1}
