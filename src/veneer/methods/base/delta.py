"""The core of a method: a trainable change of one site, declared as parameters and one formula."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.protocols import GainsInput, Served
from veneer.ops import recomputed
from veneer.ops.lowrank import is_traced
from veneer.sites import Site, find
from veneer.sites.finding.names import Target


class Delta(nn.Module, ABC):
    """A trainable change of one site. Methods derive from FactoredDelta or DenseDelta, or from Delta if
    neither fits.

    The keyword parameters of __init__(self, site, *, ..) are the method's options: the command line and files
    follow that signature. A method that can start from calibration takes `stats` by position: (self, site,
    stats, *, ..). `roles` names the parameters that optimisers treat apart: "A" for a factor on the input
    side, "B" on the output side, "magnitude" for a row magnitude, "gain" for a factor of weights. Further
    pairs are "A2", "B2" and so on.
    """

    roles: ClassVar[dict[str, str]] = {}
    scaling: float = 1.0  # of the product B A of the factors in these roles
    dropout: float = 0.0
    options: dict[str, Any]

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
        """Returns the sites in `to`, or the method's own choice for these options if `to` is None."""
        return find(model, "all-linear" if to is None else to, exclude, untie)

    def factors(self, site: Site) -> Factors | None:
        """Returns the change in normal form, differentiable, or None for a change without one."""
        return None

    @abstractmethod
    def delta(self, site: Site) -> Tensor:
        """Returns W' - W (out, in), differentiable. Raises NotMergeable if no matrix expresses the change."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns the term to add to the layer's own output y for its input x; several changes of one site
        sum."""

    def dropped(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """Returns x after the adapter's dropout, in y's dtype unless x holds token ids."""
        if self.training and self.dropout:
            x = site.drop(x, self.dropout)
        return x.to(y.dtype) if x.is_floating_point() else x


class FactoredDelta(Delta, Served):
    """A change in normal form; the method states factors() and nothing else."""

    @abstractmethod
    def factors(self, site: Site) -> Factors:
        """Returns the change in normal form, differentiable."""

    @final
    def delta(self, site: Site) -> Tensor:
        return self.factors(site).dense(site)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.factors(site).added(self.dropped(x, y, site), y, site)

    @final
    def normal_form(self, site: Site) -> Factors | None:
        if (self.training and self.dropout) or site.kind not in ROWWISE:
            return None
        found = self.factors(site)
        return found if found.c is None or isinstance(self, GainsInput) else None


class DenseDelta(Delta):
    """A change without low rank; the method states delta() and nothing else.

    W' - W is built in every pass and again in the backward, never kept in between.
    """

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        x = self.dropped(x, y, site)
        # A base that trains takes gradients through delta() too.
        plainly = site.trains or is_traced() or not torch.is_grad_enabled()
        if site.kind not in ROWWISE or plainly:
            return site.apply(x, self.delta(site).to(y.dtype))
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}

        def change(*values: Tensor) -> Tensor:
            given = {f"owner.{n}": v for n, v in zip(trained, values, strict=True)}
            made: Tensor = functional_call(_Dense(self), given, (site,))
            return made.to(y.dtype)

        return recomputed.product(x, change, tuple(trained.values()))


class _Dense(nn.Module):
    """Calls the delta() of its owner, as functional_call needs it."""

    def __init__(self, owner: DenseDelta) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, site: Site) -> Tensor:
        return self.owner.delta(site)


def master_dtype(site: Site) -> torch.dtype:
    """Returns the dtype of trained parameters: float32, or float64 on a float64 base."""
    return torch.promote_types(site.dtype, torch.float32)
