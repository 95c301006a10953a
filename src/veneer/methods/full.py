"""Full fine-tuning kept as a change: W' = W + D for every parameter, norms and biases included.

Parameters: all of the model's, or those of the modules that `to` names and of all inside them.
State: W' - W in float32, of the size of the trained parameters.
Cost: gradient and optimiser state of every parameter. As an adapter, W + D is built in every pass;
merged: none.
Use: much to learn, and enough memory; the reference for other methods.
Against: with AdamW four times the memory of the weights, and a file of the model's size for every task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import SiteError
from veneer.methods.base.delta import Delta, master_dtype
from veneer.sites import LeafSite, Site, find
from veneer.sites.find import named
from veneer.sites.finding.names import Target
from veneer.sites.own import is_own


@final
class Full(Delta):
    """D (n, 1), all parameters of one module as `LeafSite` lays them out. It serves after training, to scale
    and merge.

    Training itself writes the base (`train_only(model, "base")`): a copy of every weight beside the base
    would double the memory of the most expensive method.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        if not isinstance(site, LeafSite):
            raise SiteError(
                f"full fine-tuning changes a module's own parameters; {site.name!r} was given as a matrix"
            )
        self.D = nn.Parameter(torch.zeros_like(site.weight(), dtype=master_dtype(site)))

    @classmethod
    def find(
        cls,
        model: nn.Module,
        to: Target | None,
        exclude: Target = (),
        untie: bool = False,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> list[Site]:
        """Returns every module with parameters of its own, or those in `to` and all inside them, such as last
        layers."""
        if to == "all-linear":
            return [LeafSite(s.name, s.module) for s in find(model, to, exclude, untie)]
        chosen = named(model, to, exclude, lambda m: any(True for _ in m.parameters()))
        inside = [n for n, _ in model.named_modules() if any(n == c or n.startswith(f"{c}.") for c in chosen)]
        leaves = [
            n
            for n in inside
            if not is_own(n) and any(True for _ in model.get_submodule(n).parameters(recurse=False))
        ]
        return [LeafSite(n, model.get_submodule(n)) for n in leaves]

    def delta(self, site: Site) -> Tensor:
        return self.D

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns the module's output with W + D minus its output with W."""
        return site.apply(x, site.weight().to(self.D.dtype) + self.D).to(y.dtype) - y
