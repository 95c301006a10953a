"""Dense: W' = W + D for single matrices, D as large as W.

Parameters: in out a layer.
State: D in float32.
Cost: every pass multiplies by D like by another weight; the backward builds nothing. Merged: none.
Use: changes that other programs made and that have no low rank, such as PEFT's RoAd or C3A: `veneer convert`
keeps them in this form. Unlike the method full it stands beside other adapters of the same layer.
Against: the memory and file of full fine-tuning, and twice the computation of the layer while it acts.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from veneer.methods.base.delta import DenseDelta, master_dtype
from veneer.sites import Site


@final
class Dense(DenseDelta):
    """D (out, in) starts at zero."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros(site.out, site.in_, dtype=master_dtype(site), device=site.device))

    def delta(self, site: Site) -> Tensor:
        return self.D
