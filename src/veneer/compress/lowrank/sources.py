"""Where a compression takes blocks from: a model in memory, or the files of one of which a block is in memory
at a time.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from veneer.adapt.attached import adapters
from veneer.adapt.hooks import refuse_compiled
from veneer.compress.folder import weights
from veneer.compress.lowrank.walk import Walk
from veneer.errors import ConfigError, SiteError, first_few
from veneer.sites import Site, find, site_for
from veneer.sites.factored.layers import Factored
from veneer.sites.finding.kinds import kind_of, layers_of
from veneer.sites.finding.names import Target, excluded
from veneer.sites.finding.unfit import tied
from veneer.sites.roles import output_head

KINDS = ("linear", "transposed")


class Source(ABC):
    """Blocks by number, each with the names of its layers; `left` are layers outside, which stay dense."""

    def __init__(self, model: nn.Module, to: Target, exclude: Target) -> None:
        self.model, self.walk = model, Walk(model, lambda: self.block(0))
        chosen = _chosen(model, to, exclude)
        self.names: list[list[str]] = [
            [n.removeprefix(f"{block}.") for n in chosen if n.startswith(f"{block}.")]
            for block in self.walk.names
        ]
        inside = {f"{b}.{n}" for b, own in zip(self.walk.names, self.names, strict=True) for n in own}
        self.left = [n for n in chosen if n not in inside]
        if not inside:
            raise SiteError(f"no layer inside the blocks is left to compress: to={to!r}, exclude={exclude!r}")

    def __len__(self) -> int:
        return len(self.walk)

    @abstractmethod
    def block(self, i: int) -> AbstractContextManager[nn.Module]:
        """Yields block i in eval mode, in float32 at least and frozen; it must not be changed."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the blocks' weights are stored."""
        return next(p.dtype for p in self.walk.blocks[0].parameters() if p.is_floating_point())

    def outside(self) -> dict[str, Tensor]:
        """Returns the weights that lie outside the blocks, each shared tensor under its first name alone."""
        inside = tuple(f"{name}." for name in self.walk.names)
        return {n: t for n, t in weights(self.model).items() if not n.startswith(inside)}

    def biased(self) -> list[bool]:
        """Returns whether each layer to compress has a bias, in order."""
        modules = [(b, n) for b, own in zip(self.walk.blocks, self.names, strict=True) for n in own]
        return [getattr(b.get_submodule(n), "bias", None) is not None for b, n in modules]

    def sites(self, i: int, block: nn.Module) -> dict[str, Site]:
        """Returns the sites of block i's layers to compress, of this copy of the block, by name inside it."""
        return {n: site_for(n, block.get_submodule(n)) for n in self.names[i]}


class Held(Source):
    """A model in memory."""

    @contextmanager
    def block(self, i: int) -> Iterator[nn.Module]:
        """Yields block i itself where it is precise already, else a copy in float32."""
        block = self.walk.blocks[i]
        wide = all(not p.is_floating_point() or p.element_size() >= 4 for p in block.parameters())
        made = block if wide else copy.deepcopy(block).float()
        wanted = [(p, p.requires_grad) for p in made.parameters()]
        training = [(m, m.training) for m in made.modules()]
        made.requires_grad_(False).eval()
        try:
            yield made
        finally:
            for p, was in wanted:
                p.requires_grad_(was)
            for m, mode in training:
                m.training = mode


def _chosen(model: nn.Module, to: Target, exclude: Target) -> list[str]:
    """Names of the layers. Raises ConfigError and SiteError for those that cannot be compressed."""
    refuse_compiled(model)
    if adapters(model):
        raise ConfigError(
            f"compress the base first and attach afterwards; attached now: {first_few(adapters(model))}"
        )
    shared = _shared(model, exclude)
    if shared:
        raise SiteError(
            f"{len(shared)} layers share their weight with another layer: {first_few(shared)}; give each its"
            " own weight, or leave them out with exclude="
        )
    sites = find(model, to, exclude)
    problems = {
        "factored already": [s.name for s in sites if isinstance(s.module, Factored)],
        "quantised; compress first and quantise then": [s.name for s in sites if s.is_packed],
        "of kinds that are not compressed here": [s.name for s in sites if s.kind not in KINDS],
        "hooked or have a forward of their own, which would be lost": [
            s.name for s in sites if _held(s.module)
        ],
    }
    told = [f"these layers are {why}: {first_few(names)}" for why, names in problems.items() if names]
    if told:
        raise SiteError("\n".join(told))
    return [s.name for s in sites]


def _shared(model: nn.Module, exclude: Target) -> list[str]:
    """Returns the linear layers outside the head that share a weight, without those that `exclude` names."""
    layers, head = layers_of(model), output_head(model)
    linear = [n for n, m in layers.items() if n not in head and (k := kind_of(m)) and k.kind in KINDS]
    return [n for n in tied(layers) if n in linear and not excluded(n, exclude)]


def _held(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
