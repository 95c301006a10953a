"""Matrices that a module holds as bare parameters: fused experts, recurrent layers, packed projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.sites.bare.layouts import matrices_of
from veneer.sites.base import Site
from veneer.sites.own import CHILD


class Holder(nn.Module):
    """Stands for one matrix of a bare parameter: adapters hang on it as on a layer. It is never called.

    owner: the module with the parameter, no child of this one; index: of the matrix in a stack, or None.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, parameter: str, index: int | None, transposed: bool) -> None:
        super().__init__()
        vars(self)["owner"] = owner
        self.parameter, self.index, self.transposed = parameter, index, transposed

    @property
    def key(self) -> str:
        """The holder's name among those of its owner."""
        return self.parameter if self.index is None else f"{self.index}_{self.parameter}"


class Holders(nn.Module):
    """The child of a module whose bare parameters are adapted: one holder for each adapted matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.swapped: dict[str, Tensor | None] = {}  # the module's own parameters while it runs with others
        self.waiting: Any = None  # groups of tokens that run after the first one

    def by_parameter(self) -> dict[str, list[Holder]]:
        """Returns the holders by parameter, in the order of their matrices."""
        found: dict[str, list[Holder]] = {}
        for holder in self.children():
            assert isinstance(holder, Holder)
            found.setdefault(holder.parameter, []).append(holder)
        return found


class ParameterSite(Site):
    """W (out, in) is a parameter of `host`, or one matrix of a stack (n, .., ..). It acts in the host.

    The host then sees W' in place of W, whatever it does with it.
    """

    kind = "parameter"
    acts_by_hook = False
    module: Holder

    def weight(self) -> Tensor:
        stored = self._stored()
        return stored.mT if self.module.transposed else stored

    def _stored(self) -> Tensor:
        parameter: Tensor = getattr(self.module.owner, self.module.parameter)
        return parameter if self.module.index is None else parameter[self.module.index]

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        self._stored().copy_(W.mT if self.module.transposed else W)

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        return x @ M.mT

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

    @property
    def host(self) -> nn.Module:
        return self.module.owner

    @property
    def trains(self) -> bool:
        return self._parameter().requires_grad

    def stamp(self) -> tuple[Any, ...] | None:
        p = self._parameter()
        return None if type(p) is not nn.Parameter else (id(p), -1 if p.is_inference() else p._version)

    def _parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.module.owner, self.module.parameter)
        return parameter

    def shift(self) -> Tensor | None:
        return None  # the host adds its biases behind the product with W

    def mount(self) -> None:
        """Makes the holder a part of the model, or takes the one that is there for this matrix."""
        owner = self.module.owner
        shelf = owner._modules.get(CHILD)
        if shelf is None:
            shelf = Holders().train(owner.training)
            owner.add_module(CHILD, shelf)
        mounted = shelf._modules.get(self.module.key)
        if mounted is None:
            mounted = self.module.train(owner.training)
            shelf.add_module(self.module.key, mounted)
        assert isinstance(mounted, Holder)
        self.module = mounted


def unmount(holder: Holder) -> bool:
    """Takes a holder out of the model, and returns True if it was the last one of its owner."""
    shelf = shelf_of(holder.owner)
    if shelf is not None:
        shelf._modules.pop(holder.key, None)
        if not shelf._modules:
            del holder.owner._modules[CHILD]
            return True
    return False


def shelf_of(module: nn.Module) -> Holders | None:
    """Returns the holders of a module whose bare parameters are adapted, or None."""
    child = module._modules.get(CHILD)
    return child if isinstance(child, Holders) else None


def holders(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules by name, each followed by the holders of its matrices.

    The k-th matrix of `mlp.experts.down_proj` is called "mlp.experts.k.down_proj".
    """
    for name, module in modules.items():
        yield name, module
        shelf = shelf_of(module)
        for m in matrices_of(module):
            step = m.parameter if m.place is None else f"{m.place}.{m.parameter}"
            holder = Holder(module, *m)
            there = None if shelf is None else shelf._modules.get(holder.key)
            yield f"{name}.{step}", holder if there is None else there
