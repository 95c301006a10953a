"""A model with factored layers as a Hugging Face folder that describes itself.

config.json, generation_config.json and the tokenizer's files are those of the model that it was made from;
all weights lie in factored*.safetensors under the names of the state dict (`LAYER.A.weight`, `LAYER.B.weight`
or `LAYER.C.weight` and `LAYER.order`), and factored.json says which layers are factored, in which form and
rank. Programs that expect model.safetensors find none, and so refuse the folder instead of drawing random
layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files
from veneer.adapt.attached import adapters
from veneer.compress.places import Places
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, FormatError, VeneerError, first_few
from veneer.sites.factored.layers import FORMS, Factored, hollow
from veneer.sites.factored.site import factored_forms
from veneer.sites.quantised import formats
from veneer.version import __version__

TENSORS, DESCRIPTION, FORMAT = "factored.safetensors", "factored.json", 1
NEEDED = ("format", "model", "layers", "files")
Record = dict[str, Any]


def save_compressed(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the model with its factored layers into a new folder, whole or not at all, and returns the
    folder.

    tokenizer: saved beside the weights. record: entries for factored.json, such as the method and its
    figures. Raises
    ConfigError if no layer is factored, a layer is quantised, an adapter is attached, or the folder exists,
    and
    VeneerError if the disk is full.

    """
    folder = Path(folder)
    _check(model, folder)
    refuse_full(folder, sum(t.nbytes for t in weights(model).values()))
    with files.making(folder) as temporary:
        write(model, temporary, tokenizer=tokenizer, record=record)
    return folder


def write(
    model: nn.Module, folder: Path, *, tokenizer: Tokenizer | None, record: Mapping[str, Any] | None = None
) -> None:
    """Writes all files of such a folder into one that exists."""
    files.write_tensors(folder / TENSORS, weights(model))
    write_beside(model, folder, tokenizer)
    layers = {n: described(m) for n, m in model.named_modules() if isinstance(m, Factored)}
    describe(folder, layers, str(getattr(model, "name_or_path", "") or ""), record or {})


def describe(folder: Path, layers: Mapping[str, Record], model: str, record: Mapping[str, Any]) -> None:
    """Writes factored.json beside the tensors' files, with their checksums. model: from which it was made."""
    content = {
        "format": FORMAT,
        "veneer": __version__,
        "model": model,
        "layers": dict(layers),
        "files": {p.name: files.sha256(p) for p in sorted(folder.glob(f"{Path(TENSORS).stem}*.safetensors"))},
    }
    files.write_json(folder / DESCRIPTION, {**record, **content})


def _check(model: nn.Module, folder: Path) -> None:
    problems = [] if factored_forms(model) else ["model: no layer is factored; compress it first"]
    if adapters(model):
        problems.append(f"model: adapters are attached ({first_few(adapters(model))}); save and detach them")
    if packed := formats(model):
        problems.append(f"model: {first_few(packed, 2)} are quantised; use veneer.save_quantised for them")
    if folder.exists():
        problems.append(f"folder: {folder} exists; choose another or remove it")
    if problems:
        raise ConfigError("\n".join(problems))


def refuse_full(folder: Path, need: int) -> None:
    """Raises VeneerError if the disk of `folder` has less than `need` bytes left."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise VeneerError(
            f"folder: {folder} needs {need / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB left; free some"
        )


def described(layer: Factored) -> Record:
    """The entry of one layer in factored.json."""
    return {
        "form": layer.form,
        "out": layer.out_features,
        "in": layer.in_features,
        "rank": layer.rank,
        "bias": layer.bias is not None,
        "transposed": layer.transposed,
        "added_bias": layer.added_bias,
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each shared tensor under its first name alone."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in seen:
            seen.add(id(t))
            found[name] = t.detach()
    return found


def write_beside(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Writes configuration and tokenizer, where the model and the caller have them."""
    for part in ("config", "generation_config"):
        own = getattr(model, part, None)
        if own is not None and hasattr(own, "save_pretrained"):
            own.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def description(folder: str | Path) -> Record:
    """Returns the content of factored.json. Raises FormatError for a folder without one, or a damaged one."""
    path = Path(folder) / DESCRIPTION
    found = files.read_json(path, NEEDED)
    if found["format"] != FORMAT:
        raise FormatError(
            f"{path} has format {found['format']!r}, not {FORMAT}; read it with Veneer {found.get('veneer')}"
        )
    wrong = [n for n, e in found["layers"].items() if not _is_entry(e)]
    if wrong:
        raise FormatError(f"{path} is damaged at {first_few(wrong)}; restore it from a copy")
    return found


def _is_entry(entry: Any) -> bool:
    sizes = ("out", "in", "rank")
    return (
        isinstance(entry, dict)
        and entry.get("form") in FORMS
        and all(isinstance(entry.get(k), int) and entry[k] > 0 for k in sizes)
        and entry["rank"] <= min(entry["out"], entry["in"])
    )


def put_layers(model: nn.Module, record: Record, dtype: torch.dtype) -> None:
    """Puts factored layers without content, on the meta device, in place of the model's own.

    Raises FormatError for layers that the model lacks or holds in another size.
    """
    modules, places, wrong = dict(model.named_modules()), Places(model), []
    for name, e in record["layers"].items():
        if name not in modules:
            wrong.append(f"{name} is missing in the model")
            continue
        made = hollow(e["form"], e["out"], e["in"], e["rank"], bool(e.get("bias")), dtype)
        made.transposed, made.added_bias = bool(e.get("transposed")), bool(e.get("added_bias"))
        places.put(modules[name], made.train(modules[name].training))
    if wrong:
        raise FormatError(f"{DESCRIPTION} is of another model: {first_few(wrong)}")


def fill(model: nn.Module, folder: str | Path, record: Record, dtype: torch.dtype) -> None:
    """Loads the folder's weights into the model, in `dtype`. Raises FormatError for changed or missing files
    and weights.
    """
    tensors: dict[str, Tensor] = {}
    for name, digest in record["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise FormatError(f"{path} is missing; restore it from a copy")
        if files.sha256(path) != digest:
            raise FormatError(f"{path} is not the file that {DESCRIPTION} describes; restore it from a copy")
        held = files.read_tensors(path)
        tensors |= {n: t.to(dtype) if t.is_floating_point() else t for n, t in held.items()}
    shared = {n for n in model.state_dict() if n not in weights(model)}
    own = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in shared}
    there = {n: tuple(t.shape) for n, t in tensors.items()}
    wrong = [f"{n} {there.get(n, 'missing')}" for n in own if there.get(n) != own[n]]
    wrong += [f"{n} unexpected" for n in there if n not in own]
    if wrong:
        raise FormatError(f"{folder} is of another model: {first_few(wrong)}")
    model.load_state_dict(tensors, strict=False, assign=True)
