"""A module as a whole, from its input to its output, with no matrix of its own: a feed-forward block, an
attention."""

from __future__ import annotations

from torch import Tensor, nn

from veneer.errors import NotMergeable, SiteError
from veneer.sites.base import Site
from veneer.sites.finding.kinds import kind_of
from veneer.sites.own import base_modules


class BlockSite(Site):
    """W is (out, 0): there is nothing to merge into. in and out are those of the first and the last linear
    layer inside."""

    kind = "block"
    is_matrix = False

    def __init__(self, name: str, module: nn.Module) -> None:
        layers = [m for m in base_modules(module).values() if kind_of(m)]
        sites = [kind(name, m) for m in (layers[0], layers[-1]) if (kind := kind_of(m))] if layers else []
        if not sites:
            raise SiteError(
                f"{name!r} is a {type(module).__name__} without a linear layer inside; name a block of layers"
            )
        self.outputs = sites[-1].out
        super().__init__(name, module)
        self.in_ = sites[0].in_

    def weight(self) -> Tensor:
        first: Tensor = next(
            p for p in self.module.parameters() if p.is_floating_point()
        )  # packed weights have whole numbers too
        return first.new_empty(self.outputs, 0)

    def set_weight(self, W: Tensor) -> None:
        raise NotMergeable(
            f"{self.name!r} is a block of several layers, which has no weight to write to; keep the adapter"
        )

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        raise NotMergeable(
            f"{self.name!r} is a block of several layers, in which no matrix takes the place of another"
        )

    def drop(self, x: Tensor, p: float) -> Tensor:
        return nn.functional.dropout(x, p)

    def shift(self) -> Tensor | None:
        return None
