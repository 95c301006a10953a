"""Quantised layers as files, for bases that cannot be made again from their model alone: of QPiSSA, LoftQ, or merged into.

A folder with quantised.safetensors (`LAYER.codes`, `LAYER.absmax`, .. as in the state dict) and quantised.json, which names the
model that everything else comes from, and each layer's format and shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files
from veneer.compress.places import Places
from veneer.compress.quantise import layer_of, plain_sites
from veneer.compress.swap import one_by_one
from veneer.errors import ConfigError, FormatError, first_few
from veneer.ops import quant
from veneer.sites.quantised import formats

TENSORS, DESCRIPTION, FORMAT = "quantised.safetensors", "quantised.json", 1


def save_quantised(model: nn.Module, folder: str | Path, base: str | None = None) -> Path:
    """Writes the quantised layers of the model into `folder`, whole or not at all, and returns the folder.

    base: the model that they were made from; what the model itself says unless given. Raises ConfigError if nothing is quantised.
    """
    folder, found = Path(folder), formats(model)
    if not found:
        raise ConfigError("no layer of this model is quantised; quantise it first")
    base = base or getattr(model, "name_or_path", None)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, format in found.items():
        layer: Any = model.get_submodule(name)
        tensors |= {
            f"{name}.{k}": p.detach() for k, p in layer.named_parameters(recurse=False) if k != "bias"
        }
        layers[name] = {"format": format, "shape": list(layer.shape)}
    paths = [folder / TENSORS, folder / DESCRIPTION]
    with files.replacing(*paths) as temporary:
        files.write_tensors(temporary[0], tensors)
        files.write_json(
            temporary[1],
            {"format": FORMAT, "model": base, "layers": layers, "sha256": files.sha256(temporary[0])},
        )
    return folder


def description(folder: str | Path) -> dict[str, Any] | None:
    """What quantised.json says, or None for a folder without one. Raises FormatError for one that cannot be read."""
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return None
    found = files.read_json(path)
    if found.get("format") != FORMAT or not {"model", "layers", "sha256"} <= found.keys():
        raise FormatError(f"{path} is not what veneer.save_quantised writes; restore it from a copy")
    return found


def load_quantised(model: nn.Module, folder: str | Path) -> nn.Module:
    """The same model, the one that they were made from, with the quantised layers of `folder` in place of its own.

    Raises FormatError, before anything is changed, for changed files and for layers that are not the model's.
    """
    record = description(folder)
    if record is None:
        raise FormatError(f"{folder} holds no {DESCRIPTION}; veneer.save_quantised writes one")
    path = Path(folder) / TENSORS
    if files.sha256(path) != record["sha256"]:
        raise FormatError(
            f"{path} is not the file that {DESCRIPTION} was written with: it was changed, or a save was cut off"
        )
    tensors, layers = files.read_tensors(path), record["layers"]
    sites = [s for s in plain_sites(model) if s.name in layers]
    wrong = sorted(layers.keys() - {s.name for s in sites})
    shapes = {s.name: ((s.out, s.in_), tuple(layers[s.name]["shape"])) for s in sites}
    wrong += [f"{name} {here} here, {there} there" for name, (here, there) in shapes.items() if here != there]
    if wrong:
        raise FormatError(f"{folder} is of another model: {first_few(wrong)}")
    places = Places(model)
    for site in one_by_one(sites):
        format = quant.get(layers[site.name]["format"])
        parts = tuple(
            _of_dtype(tensors.pop(f"{site.name}.{k}"), site.dtype).to(site.device) for k in format.names
        )
        places.put(site.module, layer_of(site, parts, format))
    return model


def _of_dtype(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes as they are, and the rest in the model's dtype, in which it is the same numbers."""
    return part.to(dtype) if part.is_floating_point() else part
