"""Bottleneck adapter: h' = h + s (U f(D h + a) + u), D (r, d), U (d, r).  Houlsby et al. 2019, https://arxiv.org/abs/1902.00751

A small network behind a part of each block. Placements: "houlsby" behind the attention and behind the feed-forward part,
before they are added to what they read; "pfeiffer" behind the feed-forward part alone (https://arxiv.org/abs/2005.00247);
"parallel" beside the feed-forward part, of whose input it is made (He et al. 2021, https://arxiv.org/abs/2110.04366).

Parameters: 2 d r + r + d a place.
State: the small networks.
Cost: two more products a place, one after the other, forward and backward; it can never be merged, and at batch 1 it delays
every token.
Use: as the baseline that LoRA was compared with, and where a change must not be linear.
Against: that delay, 20 to 30 % on GPT-2 medium in the LoRA paper; at equal size it learns about as much as LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, NotMergeable, SiteError, suggest
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.factors import ROWWISE
from veneer.methods.base.options import option
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import check_at_most
from veneer.sites import BlockSite, Site, find
from veneer.sites.find import Target, named
from veneer.sites.roles import called

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}
# Where the adapters of a placement go, and the size of what they add (the parallel paper's 4).
PLACES = {
    "houlsby": ("the end of the attention block", "the end of the feed-forward block"),
    "pfeiffer": ("the end of the feed-forward block",),
    "parallel": ("the feed-forward block",),
}


@final
class Bottleneck(Delta):
    """U and u start at zero: the model starts as it was."""

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
        scaling: s; 4 for parallel and 1 else unless given
        dropout: share of the adapter's inputs dropped in training
        seed: draws the start of D, keyed by (seed, layer name)
        """
        super().__init__()
        for what, value, known in (("placement", placement, PLACES), ("activation", activation, ACTIVATIONS)):
            if value not in known:
                raise ConfigError(f"unknown {what} {value!r}{suggest(value, known)}")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), not {dropout}")
        self.parallel = placement == "parallel"
        if site.kind not in ROWWISE and not (self.parallel and isinstance(site, BlockSite)):
            raise SiteError(
                f"a {placement} adapter needs vectors, and {site.name!r} is a layer of kind {site.kind!r}; leave it out"
            )
        self.activation, self.dropout = activation, dropout
        self.scaling = (4.0 if self.parallel else 1.0) if scaling is None else scaling
        width = site.in_ if self.parallel else site.out
        check_at_most(rank, 1 << 20, "2^20", site.name)
        D = (torch.rand(rank, width, generator=keyed(seed, site.name)) * 2 - 1) / math.sqrt(width)
        like = torch.empty(0, dtype=master_dtype(site), device=site.device)
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
        """Those of `to`, or the ends of the blocks (the feed-forward blocks themselves if parallel)."""
        placement = option(cls, "placement", options)
        if placement not in PLACES:
            raise ConfigError(f"unknown placement {placement!r}{suggest(placement, PLACES)}")
        chosen = called(model, *PLACES[placement], hint="name them with to=") if to is None else to
        if placement != "parallel":
            return find(model, chosen, exclude, untie)
        return [
            BlockSite(n, model.get_submodule(n))
            for n in named(model, chosen, exclude, lambda m: any(True for _ in m.children()))
        ]

    def delta(self, site: Site) -> Tensor:
        raise NotMergeable(
            f"a bottleneck adapter at {site.name!r} is no change of a weight: there is an activation between its two products; keep it as"
            f" an adapter"
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
