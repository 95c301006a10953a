"""Names and shapes of the tensors in PEFT adapter files that hold a pair of factors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from veneer.errors import FormatError
from veneer.sites import Site


def peft_same_map(site: Site) -> bool:
    """Whether PEFT's forward is s B A on this site.

    PEFT puts a convolution in front that keeps the layer's kernel, stride and padding, but neither its dilation nor its
    padding mode, and whose A reads all groups: there its forward is another map than its own merge.
    """
    layer = site.module
    return site.kind != "conv" or (
        layer.groups == 1 and layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    )


def peft_shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    """PEFT's names of A and B at this kind of layer, A first, with their shapes."""
    if site.kind == "embedding":
        return {"lora_embedding_A": (rank, site.in_), "lora_embedding_B": (site.out, rank)}
    A = site.pack(site.weight().new_empty(rank, site.in_, device="meta"))
    return {"lora_A.weight": tuple(A.shape), "lora_B.weight": (site.out, rank, *(1,) * site.spatial)}


def peft_tensors(site: Site, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) under PEFT's names and in its shapes."""
    shapes = peft_shapes(site, A.shape[0])
    return {name: t.reshape(shapes[name]) for name, t in zip(shapes, (A, B), strict=True)}


def check_peft_tensors(site: Site, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises FormatError with a line for every tensor of the site that is missing or of another shape."""
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"missing: {site.name}.{name} {shape}")
        elif tuple(tensors[name].shape) != shape:
            wrong.append(
                f"wrong shape: {site.name}.{name} is {tuple(tensors[name].shape)}, the model and the settings ask for {shape}"
            )
    if wrong:
        raise FormatError("\n".join(wrong))


class PeftForm(NamedTuple):
    """One site's change as PEFT writes it: entries of adapter_config.json, and tensors by the end of their names.

    shared: tensors that PEFT keeps once for all layers, each of which uses the first rows and columns that it needs.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor] = {}
