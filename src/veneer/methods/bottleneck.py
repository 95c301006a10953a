"""Bottleneck adapter: h' = h + s (U f(D h + a) + u), D (r, d), U (d, r).  Houlsby et al. 2019,
https://arxiv.org/abs/1902.00751

A small network behind a part of each block. Placements: "houlsby" behind the attention and behind the
feed-forward part, before the residual sum; "pfeiffer" behind the feed-forward part alone
(https://arxiv.org/abs/2005.00247); "parallel" beside the feed-forward part and with its input (He et al.
2021, https://arxiv.org/abs/2110.04366).

Parameters: 2 d r + r + d a place.
State: the small networks.
Cost: two more products at each place, in sequence, forward and backward. It can never be merged, and at batch
1 it delays every token.
Use: as the baseline of the LoRA paper, and for a nonlinear change.
Against: that delay, 20 to 30 % on GPT-2 medium in the LoRA paper; at equal size it learns about as much as
LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import NotMergeable, SiteError
from veneer.methods.base.checks import check_choice, check_dropout, check_free_rank
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.options import option
from veneer.ops.draws import keyed
from veneer.sites import BlockSite, Site, find
from veneer.sites.find import named
from veneer.sites.finding.names import Target
from veneer.sites.roles import called

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
# The places of each placement.
PLACES = {
    "houlsby": ("the end of the attention block", "the end of the feed-forward block"),
    "pfeiffer": ("the end of the feed-forward block",),
    "parallel": ("the feed-forward block",),
}


@final
class Bottleneck(Delta):
    """U and u start at zero: the start is the base."""

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 64,
        placement: str = "houlsby",
        activation: str = "relu",
        scaling: float | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        """
        rank: r, the width of the bottleneck
        placement: houlsby, pfeiffer or parallel
        activation: f: relu, gelu or silu
        scaling: s; default 4 for parallel, as in its paper, and 1 otherwise
        dropout: share of the adapter's inputs dropped in training
        seed: key of the start of D, together with the layer's name
        """
        super().__init__()
        check_choice("placement", placement, PLACES)
        check_choice("activation", activation, ACTIVATIONS)
        check_dropout(dropout)
        self.parallel = placement == "parallel"
        is_layer = site.kind in ROWWISE and site.acts_by_hook
        if not is_layer and not (self.parallel and isinstance(site, BlockSite)):
            raise SiteError(
                f"a {placement} adapter needs vectors; {site.name!r} is of kind {site.kind!r}: exclude it"
            )
        self.activation, self.dropout = activation, dropout
        self.scaling = (4.0 if self.parallel else 1.0) if scaling is None else scaling
        width = site.in_ if self.parallel else site.out
        check_free_rank(rank, site)
        D = (torch.rand(rank, width, generator=keyed(seed, site.key)) * 2 - 1) / math.sqrt(width)
        like = torch.empty((), dtype=master_dtype(site), device=site.device)
        self.D, self.a = nn.Parameter(D.to(like)), nn.Parameter(like.new_zeros(rank))
        self.U, self.u = nn.Parameter(like.new_zeros(site.out, rank)), nn.Parameter(like.new_zeros(site.out))

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
        """Returns the sites in `to`, or the ends of the blocks (the feed-forward blocks themselves if
        parallel)."""
        placement = option(cls, "placement", options)
        check_choice("placement", placement, PLACES)
        chosen = called(model, *PLACES[placement], hint="name them with to=") if to is None else to
        if placement != "parallel":
            return find(model, chosen, exclude, untie)
        return [
            BlockSite(n, model.get_submodule(n))
            for n in named(model, chosen, exclude, lambda m: any(True for _ in m.children()))
        ]

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(
            f"the bottleneck at {site.name!r} is nonlinear and cannot be merged; keep it as an adapter"
        )

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        h = x.to(y.dtype) if self.parallel else y
        if self.training and self.dropout:
            h = nn.functional.dropout(h, self.dropout)
        D, a, U, u = (p.to(y.dtype) for p in (self.D, self.a, self.U, self.u))
        change: Tensor = nn.functional.linear(
            ACTIVATIONS[self.activation](nn.functional.linear(h, D, a)), U, u
        )
        return change if self.scaling == 1 else self.scaling * change
