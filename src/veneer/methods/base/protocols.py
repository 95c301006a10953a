"""Optional abilities of a method; the code that needs one asks with isinstance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, nn

from veneer.methods.base.factors import Factors, Products
from veneer.sites import Site


class Served(ABC):
    """A change that hooks sum with others and that a bank serves row by row, on sites where it has such a
    form."""

    @abstractmethod
    def normal_form(self, site: Site) -> Factors | None:
        """Returns the factors if forward() computes exactly these now, on vectors one by one; else None."""

    def products(self, site: Site) -> Products | None:
        """Returns the change as products with W, differentiable, for a change without a normal form; else
        None."""
        return None


class GainsInput(Served):
    """A change that may multiply the layer's input, by a hook in front of the layer."""

    def gains_input(self, site: Site) -> bool:
        """True if the change may multiply the input of this site."""
        form = self.normal_form(site)
        return form is not None and form.c is not None

    def input_gain(self, x: Tensor, site: Site) -> Tensor | None:
        """Returns the factor for the layer's input x, broadcastable to it, for a change that acts alone in
        full."""
        form = self.normal_form(site)
        return None if form is None else form.c


class TurnsInput(ABC):
    """A change that alone and in full acts by another input for the layer, by a hook in front of it."""

    @abstractmethod
    def turned(self, x: Tensor, site: Site) -> Tensor | None:
        """Returns the input in place of x, or None on a site where the change does not act this way."""


class Dialled(ABC):
    """A change with a dial of its own: at strength t it is another change than t (W' - W)."""

    @abstractmethod
    def delta_at(self, site: Site, strength: float) -> Tensor:
        """Returns the change of W (out, in) at this strength."""

    @abstractmethod
    def forward_at(self, x: Tensor, y: Tensor, site: Site, strength: float) -> Tensor:
        """Returns the term to add to the layer's own output y at this strength."""


class SubtractsStart(ABC):
    """A change whose B A may start away from zero and has that start subtracted."""

    @abstractmethod
    def taken(self) -> Factors | None:
        """Returns the subtracted start B0 A0, or None if the start is zero."""


class AddsInPlace(ABC):
    """A change that adds itself to the layer's output more cheaply than by a separate tensor."""

    @abstractmethod
    def onto(self, x: Tensor, y: Tensor, site: Site, *, writable: bool) -> Tensor:
        """Returns y plus the change, which acts alone in full. writable: y may be overwritten."""


class FollowsBase(ABC):
    """A change that holds numbers computed from W, which are computed again after W was written to."""

    @abstractmethod
    def refresh(self, site: Site) -> None:
        """Computes them from the W that is there now."""


class Shifts(ABC):
    """A change of a matrix that adds a bias too."""

    @abstractmethod
    def shift(self, site: Site) -> Tensor:
        """Returns the bias b (out,) that it adds to the layer's output."""


class Switched(ABC):
    """A change that acts by a state outside of it, such as the rows of a bank."""

    @abstractmethod
    def state(self) -> tuple[int, ...]:
        """Returns a value that differs after the state was changed."""


class Routed(ABC):
    """A change that differs from token to token, as a bank's; fused experts run once for each adapter."""

    @abstractmethod
    def groups(self, tokens: int) -> list[tuple[Hashable, Tensor | None]]:
        """Returns the adapters among that many tokens, each with the numbers of its tokens, None for all.

        Raises ShapeError for tokens that do not belong to the rows of the batch.
        """

    @abstractmethod
    def of_group(self, key: Hashable, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Returns A (r, in), B (out, r) and excess (out,) of one adapter of `groups`, None for the base's W.

        W' = (1 + excess) W + B A; an excess of None is 0.
        """


class Resizes(ABC):
    """A change whose parameters change their sizes while it trains."""

    @abstractmethod
    def resize(self, sizes: Mapping[str, torch.Size]) -> None:
        """Gives the parameters and buffers the sizes of a saved state of parameters, by name; its numbers
        follow."""


class OpensModel(ABC):
    """A method that prepares the whole model before its first change is attached, and restores it after the
    last."""

    @classmethod
    @abstractmethod
    def open(cls, model: nn.Module) -> None:
        """Prepares the model."""

    @classmethod
    @abstractmethod
    def close(cls, model: nn.Module) -> None:
        """Restores the model."""
