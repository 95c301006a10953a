"""kohya's sd-scripts and LyCORIS: one file with lora_down (A), lora_up (B), alpha and dora_scale.

https://github.com/KohakuBlueleaf/LyCORIS. Plain LoRA, its Tucker form and DoRA by output rows are read.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from veneer import files
from veneer.convert import clip_names, tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import BLOCKS, Pair, Pairs, only
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import ConfigError, FormatError, first_few, suggest

FILE = "lora.safetensors"
ENDINGS = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "m",
    ".scalar": "scalar",
}
PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
    "lycoris": "",
}


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs in a file.

    `base.names` resolve the flattened names: those of the model, or of a pipeline's models by part.
    """
    modules = by_module(tensor_files.tensors(found.file), ENDINGS, rest)
    names = resolve(modules, base.names)
    parts = tuple(sorted({p for flat in modules if (p := _split(flat)[0])}))
    return Pairs({names[flat]: _pair(names[flat], roles) for flat, roles in modules.items()}, parts)


def _split(flat: str) -> tuple[str, str]:
    """Returns ("unet", "down_blocks_0_..") for "lora_unet_down_blocks_0_.."."""
    prefix = next((p for p in sorted(PARTS, key=len, reverse=True) if flat.startswith(f"{p}_")), None)
    if prefix is None:
        raise FormatError(f"name must begin with one of {', '.join(PARTS)}, got {flat!r}")
    return PARTS[prefix], flat.removeprefix(f"{prefix}_")


def resolve(modules: Iterable[str], names: tuple[str, ...]) -> dict[str, str]:
    """Returns {flattened name: real name}. Raises ConfigError for names with no match or several matches."""
    flattened: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        for spelled in {name, clip_names.in_files(name)}:
            flattened[spelled.replace(".", "_")].append(name)
    found: dict[str, str] = {}
    lost: list[str] = []
    several: list[str] = []
    for flat in modules:
        part, inner = _split(flat)
        fits = flattened[f"{part}_{inner}"] if part and f"{part}_{inner}" in flattened else flattened[inner]
        if len(fits) == 1:
            found[flat] = fits[0] if not part or fits[0].startswith(f"{part}.") else f"{part}.{fits[0]}"
        else:
            (several if fits else lost).append(f"{flat} ({' or '.join(fits)})" if fits else flat)
    if several:
        raise ConfigError(
            f"underscores stand for dots; names that match several modules: {first_few(several)}"
        )
    if lost:
        hint = (
            "the given model has no such modules"
            if names
            else "give the base model with model=, or its modules' names with names="
        )
        raise ConfigError(
            f"underscores stand for dots; {len(lost)} names match no known module: {first_few(lost)}; {hint}"
        )
    return found


def _pair(name: str, roles: Roles) -> Pair:
    A, B = roles["A"], roles["B"].flatten(1)
    if "mid" in roles:  # down (r, in, 1, 1), then mid (r, r, kh, kw)
        A = torch.einsum("rs...,si->ri...", roles["mid"], A.flatten(1))
    alpha = float(roles["alpha"]) if "alpha" in roles else float(A.shape[0])  # default scaling: 1
    if "scalar" in roles:
        alpha *= float(roles["scalar"])
    return Pair(
        A, B, alpha / A.shape[0], _magnitude(name, roles.get("m"), B), "conv" if A.ndim > 2 else "linear"
    )


def _magnitude(name: str, m: Tensor | None, B: Tensor) -> Tensor | None:
    """Returns m (out,). Refuses LyCORIS's scales of input columns (wd_on_output=False): another method."""
    if m is None:
        return None
    if m.shape[0] != B.shape[0] or m.numel() != B.shape[0]:
        shape = tuple(m.shape)
        raise FormatError(
            f"{name}: dora_scale {shape} scales input columns (wd_on_output=False), which is not DoRA;"
            " merge it with LyCORIS"
        )
    return m.flatten()


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes lora.safetensors into `folder`; rounds alpha to float32 and nothing else.

    Raises FormatError for embeddings, which the dialect cannot hold, and for names that flatten to the same
    name.
    """
    only(pairs, ("linear", "conv"), "kohya's format", magnitude=True)
    if any(name.startswith(BLOCKS) for name in pairs.sites):
        raise FormatError(
            "kohya's format names the layers of Flux and its like as their authors do, several fused,"
            " which is not written here; use to='diffusers'"
        )
    tensors: dict[str, Tensor] = {}
    for name, p in pairs.sites.items():
        flat, ones = flattened(clip_names.in_files(name), pairs.parts), (1,) * (p.A.ndim - 2)
        if f"{flat}.alpha" in tensors:
            raise FormatError(f"{name} and another layer are both named {flat} in kohya's format")
        own = {
            "lora_down.weight": p.A,
            "lora_up.weight": p.B.reshape(*p.B.shape, *ones),
            "alpha": torch.tensor(p.scaling * p.rank),
        }
        if p.magnitude is not None:
            own["dora_scale"] = p.magnitude.reshape(-1, 1, *ones)
        tensors |= {f"{flat}.{k}": t for k, t in own.items()}
    with files.replacing(folder / FILE) as (path,):
        files.write_tensors(path, tensors)
    return [] if pairs.parts else ["layers are named lycoris_..; for a part of a pipeline give part="]


def flattened(name: str, parts: tuple[str, ...]) -> str:
    """Returns "lora_unet_.." for a layer of a pipeline's part, "lycoris_.." for a layer of a single model.

    With two text encoders the names begin with lora_te1 and lora_te2.
    """
    part = next((p for p in parts if name.startswith(f"{p}.")), "")
    prefix = next((k for k, v in PARTS.items() if v == part), None)
    if prefix is None:
        raise ConfigError(
            f"unknown part {part!r} of kohya's format{suggest(part, filter(None, PARTS.values()))}"
        )
    if prefix == "lora_te" and any(re.fullmatch(r"text_encoder_\d", p) for p in parts):
        prefix = "lora_te1"
    return f"{prefix}_{name.removeprefix(f'{part}.') if part else name}".replace(".", "_")
