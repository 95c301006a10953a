"""BitFit: b' = b + d, every bias and nothing else.  Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199

Covers linear layers, convolutions and norms with a bias. Many current models have no bias at all. If `to`
names linear layers without one, these get a bias while the adapter acts; it cannot be merged.

Parameters: every bias, about a thousandth of the model.
State: the changes of the biases.
Cost: one addition per number; merged: none. The backward keeps nothing of a layer's input.
Use: a baseline; the smallest change that reaches all layers.
Against: below LoRA on all but small tasks in the LoRA paper; PEFT has no such method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import SiteError
from veneer.methods.base.delta import Delta, master_dtype
from veneer.sites import BiasSite, Site, find
from veneer.sites.find import named
from veneer.sites.finding.kinds import kind_of
from veneer.sites.finding.names import Target


@final
class BitFit(Delta):
    """d (out,) starts at zero."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        if not isinstance(site, BiasSite):
            raise SiteError(f"bitfit changes biases; {site.name!r} was given as a matrix")
        self.d = nn.Parameter(torch.zeros(site.out, dtype=master_dtype(site), device=site.device))

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
        """Returns every module with a bias, or the modules in `to`: any with a bias, and linear maps
        without."""
        if to == "all-linear":
            return [BiasSite(s.name, s.module) for s in find(model, to, exclude, untie=True)]
        names = named(
            model, to, exclude, has_bias if to is None else lambda m: has_bias(m) or kind_of(m) is not None
        )
        if not names:
            raise SiteError(
                f"{type(model).__name__} has no bias to train; to='all-linear' gives every linear layer one"
            )
        return [BiasSite(n, model.get_submodule(n)) for n in names]

    def delta(self, site: Site) -> Tensor:
        return self.d[:, None]

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.rows(self.d.to(y.dtype))


def has_bias(module: nn.Module) -> bool:
    """True if the module adds a bias of its own to its outputs."""
    bias = module._parameters.get("bias")
    return bias is not None and bias.ndim == 1
