"""Examples of tensors by name as few large tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def as_tensors(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the values of each key end to end, and their shapes under "key.shape"."""
    found: dict[str, Tensor] = {}
    for key in examples[0] if examples else ():
        values = [e[key] for e in examples]
        found[key] = torch.cat([v.reshape(-1) for v in values])
        found[f"{key}.shape"] = torch.tensor([v.shape for v in values]).view(len(values), -1)
    return found


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Any]:
    """Returns the examples of `as_tensors`; other names may be among them."""
    keys = [k.removesuffix(".shape") for k in tensors if k.endswith(".shape")]
    columns = {}
    for key in keys:
        shapes = [tuple(s) for s in tensors[f"{key}.shape"].tolist()]
        sizes = [torch.Size(s).numel() for s in shapes]
        parts = tensors[key].split(sizes)
        columns[key] = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
