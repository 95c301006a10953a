"""LoHa and LoKr in kohya's and LyCORIS's files: <flattened name>.hada_w1_a, .alpha, .scalar.

LyCORIS scales by alpha / rank, by 1 without an alpha or with 0, and by 1 where both matrices of LoKr are
whole, whatever alpha is. https://github.com/KohakuBlueleaf/LyCORIS
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from veneer import files
from veneer.convert import clip_names, tensor_files
from veneer.convert.base import Base
from veneer.convert.dialects import kohya
from veneer.convert.lycoris.layers import TENSORS, Layer, Layers, method_of
from veneer.convert.pairs import TRAINED
from veneer.errors import FormatError, first_few

BESIDE = ("alpha", "scalar")


def holds(file: Path) -> str | None:
    """Returns the method of a file's layers, LOHA or LOKR, or None for other files."""
    return method_of({name.rpartition(".")[2] for name in tensor_files.keys(file)})


def read(file: Path, base: Base) -> Layers:
    """Returns the layers of a file by the names in base.names.

    Raises FormatError for tensors of other methods beside them, and for DoRA's magnitudes. Raises ConfigError
    for names with no match.
    """
    method = holds(file)
    modules: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    odd = []
    for name, t in tensor_files.tensors(file).items():
        flat, _, end = name.rpartition(".")
        if method is None or end not in {*TENSORS[method], *BESIDE}:
            odd.append(name)
        modules[flat][end] = t
    if method is None or odd:
        raise FormatError(
            f"{file} holds other tensors than those of {method}: {first_few(odd)}; merge it there"
        )
    names = kohya.resolve(modules, base.names)
    return Layers(method, {names[flat]: _layer(own) for flat, own in modules.items()})


def _layer(own: dict[str, Tensor]) -> Layer:
    layer = Layer({n: t for n, t in own.items() if n not in BESIDE}, 1.0)
    alpha = float(own["alpha"]) if "alpha" in own else 0.0
    scaling = alpha / layer.rank if alpha and layer.rank else 1.0
    return replace(layer, scaling=scaling * float(own.get("scalar", torch.ones(()))))


def write(layers: Layers, folder: Path) -> list[str]:
    """Writes lora.safetensors into `folder`; returns a note where a scaling was folded into a matrix."""
    firsts = {n.partition(".")[0] for n in layers.sites}
    parts = tuple(sorted(firsts)) if firsts <= set(TRAINED) else ()
    tensors: dict[str, Tensor] = {}
    folded = []
    for name, layer in layers.sites.items():
        flat, own, rank = kohya.flattened(clip_names.in_files(name), parts), dict(layer.tensors), layer.rank
        if f"{flat}.alpha" in tensors:
            raise FormatError(f"{name} and another layer are both named {flat} in kohya's format")
        if rank is None and layer.scaling != 1:  # LyCORIS would ignore it
            own["lokr_w1"] = (layer.scaling * own["lokr_w1"].double()).to(own["lokr_w1"])
            folded.append(name)
        own["alpha"] = torch.tensor(1.0 if rank is None else layer.scaling * rank)
        tensors |= {f"{flat}.{end}": t.contiguous() for end, t in own.items()}
    with files.replacing(folder / kohya.FILE) as (path,):
        files.write_tensors(path, tensors)
    return [f"the scaling was folded into the first matrix at {len(folded)} layers"] if folded else []
