"""diffusers: one file, names that begin with a part of the pipeline, settings as JSON in the file's header.

https://huggingface.co/docs/diffusers/api/loaders/lora. Without settings, alpha equals the rank. Older files
hold `.alpha` tensors, and so do those of ComfyUI, ai-toolkit and musubi-tuner, whose names begin with
`diffusion_model.` and end as kohya's. diffusers silently reads nothing from a file with PEFT's own prefix.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from veneer import files, foreign
from veneer.adapt.peft.settings import KEYS, PREFIX
from veneer.adapt.peft.targets import at
from veneer.convert import clip_names, tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.dialects import peft
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pair, Pairs, only, take_part, uniform
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import ConfigError, FormatError

FILE, HEADER = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
    ".alpha": "alpha",
}
# PEFT's settings in the header: those that LoraConfig needs to load the tensors.
IN_HEADER = ("r", "lora_alpha", "target_modules", "use_dora", "lora_dropout", "bias")
PART = re.compile(
    r"(unet|transformer|transformer_2|prior|controlnet|text_encoder|text_encoder_2|text_encoder_3)\."
)


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs in a file written by any version of diffusers."""
    tensors = {_modern(k): t for k, t in tensor_files.tensors(found.file).items()}
    modules = {_known(n, base.names): roles for n, roles in by_module(tensors, ENDINGS, rest).items()}
    parts = sorted({m[1] for n in modules if (m := PART.match(n))})
    settings = _header(found.file)
    sites = {n: _pair(n, roles, settings) for n, roles in modules.items()}
    odd = [n for n in sites if not PART.match(n)]
    if odd and parts:
        raise FormatError(
            f"{found.file}: all modules must belong to a part of the pipeline, but {len(odd)} do not, e.g."
            f" {odd[0]}"
        )
    return Pairs(sites, tuple(parts))


def _modern(name: str) -> str:
    """Returns `attn1.to_q.lora_A.weight` for `attn1.processor.to_q_lora.down.weight` (before 0.17)."""
    old = re.fullmatch(r"(.*?\.)(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight", name)
    if old is None:
        return name
    if name.startswith("text_encoder"):
        layer = f"{old[2]}_proj"
    else:
        layer = "to_out.0" if old[2] == "out" else f"to_{old[2]}"
    return f"{old[1]}{layer}.lora_{'A' if old[3] == 'down' else 'B'}.weight"


def _known(name: str, names: Sequence[str]) -> str:
    """Returns the name without ComfyUI's "diffusion_model." and without CLIP's "text_model." where the base
    calls its layer so.
    """
    if (short := clip_names.in_model(name, names)) != name:
        return short
    inner = re.sub(r"^(model\.)?diffusion_model\.", "", name)
    fits = [n for n in names if n == inner or (PART.sub("", n, 1) == inner and PART.match(n))]
    return fits[0] if inner != name and len(fits) == 1 else name


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Returns PEFT's settings by part. Raises FormatError if the header is not a JSON object."""
    try:
        flat = foreign.loads(tensor_files.metadata(file).get(HEADER, "{}"))
        found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in flat.items():
            part, _, key = name.partition(".")
            found[part][key] = value
    except (json.JSONDecodeError, AttributeError) as e:
        raise FormatError(f"{file}: {HEADER} in the header is not a JSON object ({e})") from None
    return dict(found)


def _pair(name: str, roles: Roles, settings: Mapping[str, dict[str, Any]]) -> Pair:
    """Returns a pair. Settings override `.alpha` tensors, as in diffusers; without both the scaling is 1."""
    A, B, m = roles["A"], roles["B"].flatten(1), roles.get("m")
    part, _, inner = name.partition(".")
    scaling = float(roles["alpha"]) / A.shape[0] if "alpha" in roles else 1.0
    if part in settings:
        config = {**KEYS, **settings[part]}
        own = at(config, inner)
        if own["r"] != A.shape[0]:
            raise FormatError(f"{name}: rank {A.shape[0]} in the file, {own['r']} in its header")
        scaling = own["lora_alpha"] / (math.sqrt(own["r"]) if config["use_rslora"] else own["r"])
    return Pair(A, B, scaling, None if m is None else m.flatten(), "conv" if A.ndim > 2 else "linear")


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes pytorch_lora_weights.safetensors with its settings in the header.

    Each part gets one rank and one scaling, because older versions of diffusers misread mixed ones. Raises
    ConfigError for an adapter of a single model without part=.
    """
    only(pairs, ("linear", "conv"), "diffusers", magnitude=True)
    if not pairs.parts:
        raise ConfigError(
            "diffusers' files name the part of the pipeline; give the part that this adapter changes:"
            " part='unet', .."
        )
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    notes: list[str] = []
    for part in pairs.parts:
        ready, done = uniform(take_part(pairs, part))
        own = {n.removeprefix(f"{part}."): p for n, p in ready.sites.items()}
        alone = Pairs(own, dropout=pairs.dropout)
        named = {f"{part}.{k.removeprefix(PREFIX)}": t for k, t in peft.named(alone).items()}
        tensors |= {clip_names.in_files(k): t for k, t in named.items()}
        header |= {f"{part}.{k}": v for k, v in peft.settings(alone, base).items() if k in IN_HEADER}
        notes += [f"{part}: {n}" for n in done]
    text = json.dumps(header, sort_keys=True)
    with files.replacing(folder / FILE) as (path,):
        save_file(
            {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()},
            path,
            {"format": "pt", HEADER: text},
        )
    return notes
