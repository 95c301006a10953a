"""Saves and loads quantised layers of bases that their model alone cannot reproduce: QPiSSA, LoftQ, merged.

A folder holds quantised.safetensors (`LAYER.codes`, `LAYER.absmax`, .. as in the state dict) and
quantised.json, which names the model that the rest comes from, and the format and shape of each layer.
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
    """Writes the quantised layers of the model into `folder`, completely or not at all; returns the folder.

    base: the original model; the model's name_or_path unless given. Raises ConfigError if no layer is
    quantised.
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
    """Returns the content of quantised.json, or None if it is missing.

    Raises FormatError if it is damaged.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        return None
    found = files.read_json(path)
    if found.get("format") != FORMAT or not {"model", "layers", "sha256"} <= found.keys():
        raise FormatError(
            f"{path} was not written by veneer.save_quantised, or is damaged; restore it from a copy"
        )
    return found


def load_quantised(model: nn.Module, folder: str | Path) -> nn.Module:
    """Replaces layers of the original model by the quantised layers of `folder`, in place; returns the model.

    Raises FormatError, before any change, for changed files and for layers that the model lacks.
    """
    record = description(folder)
    if record is None:
        raise FormatError(
            f"{folder} lacks {DESCRIPTION}, which veneer.save_quantised writes; give another folder"
        )
    path = Path(folder) / TENSORS
    if files.sha256(path) != record["sha256"]:
        raise FormatError(
            f"{path} does not match {DESCRIPTION}; the file was changed or a save was interrupted;"
            " restore it from a copy"
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
    """Returns codes unchanged and other parts in the model's dtype, which holds them exactly."""
    return part.to(dtype) if part.is_floating_point() else part
