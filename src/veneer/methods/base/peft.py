"""A change as PEFT stores it: settings and tensors, and the names and shapes of a pair of factors there."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.methods.base.delta import Delta
from veneer.sites import Site


class PeftForm(NamedTuple):
    """One site's change as PEFT writes it: entries of adapter_config.json, and tensors by the end of their
    names.

    shared: tensors that PEFT keeps once for all layers; each layer uses the rows and columns that it needs.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = {}


class PeftKind(ABC):
    """A method that PEFT has too."""

    # Entries of adapter_config.json beside the general ones, with PEFT's defaults. LoRA's are in
    # adapt/peft/settings.
    peft_settings: ClassVar[dict[str, Any]] = {}

    @classmethod
    @abstractmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """True if an adapter with this adapter_config.json is of this method."""


class PeftStored(PeftKind):
    """A method whose changes PEFT stores site by site."""

    @abstractmethod
    def to_peft(self, site: Site) -> PeftForm | None:
        """Returns the change as PEFT expresses it exactly on the untouched base, or None if PEFT cannot."""

    @classmethod
    def peft_room(cls, sites: Sequence[Site], config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes that PEFT expects of shared tensors, by name, if the sites' own parts are
        less."""
        return {}

    @classmethod
    @abstractmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        """Returns the change that PEFT wrote as `tensors` for this site; config: the settings at this site.

        Raises FormatError for tensors that are missing, misshaped or not expressible here.
        """


def peft_same_map(site: Site) -> bool:
    """True if PEFT's forward is s B A on this site.

    For a convolution PEFT runs A as a convolution with the layer's kernel, stride and padding. It drops
    dilation and padding mode, and A reads all groups: in these cases its forward differs from its own merge.
    """
    layer = site.module
    return site.kind != "conv" or (
        layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    )


def peft_dense_map(site: Site) -> bool:
    """True if PEFT applies a dense change to this layer by the layer's own operation (its LyCORIS
    methods)."""
    return site.kind == "linear" or (
        site.kind == "conv" and site.spatial < 3 and site.module.padding_mode == "zeros"
    )


def peft_shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns PEFT's names of A and B for this kind of layer, A first, with their shapes."""
    if site.kind == "embedding":
        return {"lora_embedding_A": (rank, site.in_), "lora_embedding_B": (site.out, rank)}
    A = site.pack(site.weight().new_empty(rank, site.in_, device="meta"))
    return {"lora_A.weight": tuple(A.shape), "lora_B.weight": (site.out, rank, *(1,) * site.spatial)}


def peft_tensors(site: Site, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Returns A (r, in) and B (out, r) under PEFT's names and in its shapes."""
    shapes = peft_shapes(site, A.shape[0])
    return {name: t.reshape(shapes[name]) for name, t in zip(shapes, (A, B), strict=True)}


def check_peft_tensors(site: Site, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises FormatError with a line for every tensor of the site that is missing or misshaped."""
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"missing: {site.name}.{name} {shape}")
        elif tuple(tensors[name].shape) != shape:
            wrong.append(
                f"wrong shape: {site.name}.{name} is {tuple(tensors[name].shape)},"
                f" the model and the settings ask for {shape}"
            )
    if wrong:
        raise FormatError("\n".join(wrong))


def check_peft_dims(site: Site, tensors: dict[str, Tensor], dims: dict[str, int]) -> None:
    """Raises FormatError with a line for every tensor that is missing, empty, or has another number of
    dimensions."""
    wrong = [f"missing: {site.name}.{name}" for name in dims if name not in tensors]
    wrong += [
        f"wrong shape: {site.name}.{name} is {tuple(tensors[name].shape)},"
        f" PEFT's has {n} dimensions, none of them empty"
        for name, n in dims.items()
        if name in tensors and (tensors[name].ndim != n or not tensors[name].numel())
    ]
    if wrong:
        raise FormatError("\n".join(wrong))


def peft_flat(t: Tensor) -> Tensor:
    """Returns the tensor as a matrix of rows; a vector or a number stays, for check_peft_tensors to name."""
    return t.flatten(1) if t.ndim > 1 else t


def peft_core(
    site: Site, tensors: dict[str, Tensor], names: tuple[str, str, str], sides: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Returns the pair (out, r), (r, in kernel) in place of PEFT's core of a convolution.

    names: of the core t (r, r, kernel..) and of a (r, out), b (r, in). sides: r, out, in times the kernel.
    """
    (core, left, right), (r, out, in_) = names, sides
    kernel = tuple(site.module.kernel_size) if site.kind == "conv" else ()
    check_peft_tensors(
        site, tensors, {core: (r, r, *kernel), left: (r, out), right: (r, in_ // math.prod(kernel))}
    )
    whole = torch.einsum("ij...,jn->in...", tensors[core], tensors[right]).flatten(1)
    return {left: tensors[left].mT, right: whole}
