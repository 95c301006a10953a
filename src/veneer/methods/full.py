"""Full fine-tuning kept as a change: W' = W + D for every parameter, norms and biases included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.errors import SiteError
from veneer.methods.base import Delta, master_dtype
from veneer.sites import LeafSite, Site


class Full(Delta):
    """D (n, 1), all parameters of one module as `LeafSite` lays them out. Used after training, to dial and to merge.

    Training itself writes the base (`train_only(model, "base")`): a copy of every weight beside the base would double
    the memory of the most expensive method there is.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        if not isinstance(site, LeafSite):
            raise SiteError(f"full fine-tuning changes a module's own parameters; {site.name!r} was given as a matrix")
        self.D = nn.Parameter(torch.zeros_like(site.weight(), dtype=master_dtype(site)))

    def delta(self, site: Site) -> Tensor:
        return self.D

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The module's output with W + D, less its output with W."""
        return site.apply(x, site.weight().to(self.D.dtype) + self.D).to(y.dtype) - y
