"""torchtune: lora_a, lora_b and magnitude under its own module names, rows of q and k in Meta's rotary order.

https://github.com/pytorch/torchtune, no longer maintained. Besides its own form (adapter_model.pt) it exports
PEFT's names with three settings. That export reorders the rows of q and k of every model, even if they never
were in Meta's order, and never those of magnitudes. So the own form is preferred, and a wrong export is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer import files
from veneer.adapt.peft.settings import CONFIG, TENSORS
from veneer.convert import tensor_files
from veneer.convert.base import Base, of_config
from veneer.convert.detect import Found
from veneer.convert.dialects import peft
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pair, Pairs, bare, only, uniform
from veneer.convert.tensor_roles import by_module
from veneer.errors import FormatError, first_few, suggest

ENDINGS = {".lora_a.weight": "A", ".lora_b.weight": "B", ".magnitude": "m"}
MODULES = {  # torchtune's name in a layer -> transformers' name
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
HEAD = {"output": "lm_head"}
# True if torchtune reorders the rows of q and k, by transformers' model_type.
TURNED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs in torchtune's own form or in its export.

    Sizes of the attention come from `base` or from a config.json in the folder.
    """
    if (found.folder / "config.json").is_file():
        base = base.also(of_config(files.read_json(found.folder / "config.json")))
    tensors = tensor_files.tensors(found.file)
    settings = _settings(found)
    if any(k.startswith("base_model.model.") for k in tensors):
        return _exported(found, base, tensors, rest)
    sites = {}
    for module, roles in by_module(tensors, ENDINGS, rest).items():
        name = _name(module)
        pair = Pair(roles["A"], roles["B"], settings["lora_alpha"] / settings["r"], roles.get("m"))
        sites[name] = turn(name, pair, base, to_meta=False)
    wrong = [
        f"{n}: rank {p.rank} in the file, {settings['r']} in the settings"
        for n, p in sites.items()
        if p.rank != settings["r"]
    ]
    if wrong:
        raise FormatError(f"{CONFIG} contradicts the tensors: {first_few(wrong)}")
    return Pairs(sites, origin=settings.get("base_model_name_or_path"))


def _settings(found: Found) -> dict[str, Any]:
    missing = [k for k in ("r", "lora_alpha") if k not in found.config]
    if missing:
        raise FormatError(
            f"{found.folder / CONFIG} lacks {' and '.join(missing)}, which the scaling depends on; add them"
        )
    return found.config


def _exported(found: Found, base: Base, tensors: Mapping[str, Tensor], rest: Leftovers) -> Pairs:
    better = f"read the folder with adapter_model.pt, which torchtune wrote beside {found.file.name}"
    if any(re.search(r"\.[qk]_proj\.lora_magnitude_vector", k) for k in tensors):
        raise FormatError(
            f"{found.file}: torchtune's export orders the magnitudes of q and k unlike the rows; {better}"
        )
    if (
        base.kind
        and TURNED.get(base.kind) is False
        and any(re.search(r"\.[qk]_proj\.lora_B", k) for k in tensors)
    ):
        raise FormatError(
            f"{found.file}: torchtune's export reorders the rows of q and k of {base.kind} models wrongly;"
            f" {better}"
        )
    dora = any("lora_magnitude_vector" in k for k in tensors)
    # After an interrupted training the settings hold torchtune's module names, so target_modules is ignored.
    config = {**found.config, "peft_type": "LORA", "use_dora": dora, "target_modules": None}
    return peft.read(found._replace(config=config), base, rest)


def _name(module: str) -> str:
    """Returns "model.layers.0.self_attn.q_proj" for "layers.0.attn.q_proj".

    Raises FormatError for an unknown module.
    """
    layer, inner = re.fullmatch(r"(layers\.\d+\.)?(.*)", module).groups()  # type: ignore[union-attr]
    table = MODULES if layer else HEAD
    if inner not in table:
        raise FormatError(f"unknown torchtune module {module!r}{suggest(inner, table)}")
    return f"model.{layer}{table[inner]}" if layer else table[inner]


def turn(name: str, pair: Pair, base: Base, *, to_meta: bool) -> Pair:
    """Returns the pair of q or k with its rows in the other rotary order; other pairs unchanged.

    transformers rotates row i of a head with row i + head/2; Meta's code and torchtune rotate row 2i with row
    2i + 1.
    """
    which = re.search(r"\.([qk])_proj$", name)
    if which is None:
        return pair
    base.need(
        "kind", "heads", "kv_heads", "head", why="torchtune orders the rows of q and k by attention heads"
    )
    if base.kind not in TURNED:
        known = ", ".join(TURNED)
        raise FormatError(
            f"torchtune's order of the rows of q and k is unknown for {base.kind} models; known: {known}"
        )
    heads, head = base.heads if which[1] == "q" else base.kv_heads, base.head
    assert heads and head
    if pair.B.shape[0] != heads * head:
        wanted = f"{heads * head} rows ({heads} heads of {head})"
        raise FormatError(
            f"{name} must have {wanted} to fit the base model, got {pair.B.shape[0]}; give the right base"
        )
    if not TURNED[base.kind]:
        return pair

    def rows(t: Tensor) -> Tensor:
        split = t.reshape(heads, 2, head // 2, -1) if to_meta else t.reshape(heads, head // 2, 2, -1)
        return split.transpose(1, 2).reshape(t.shape)

    return replace(pair, B=rows(pair.B), magnitude=None if pair.magnitude is None else rows(pair.magnitude))


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes torchtune's own form as adapter_model.safetensors, its adapter_checkpoint.

    Raises FormatError for layers that torchtune does not adapt.
    """
    only(pairs, ("linear",), "torchtune", magnitude=True)
    own = {v: k for k, v in MODULES.items()}
    heads = {v: k for k, v in HEAD.items()}
    ready, notes = uniform(bare(pairs))
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    unknown: list[str] = []
    for name, p in ready.sites.items():
        inside = re.fullmatch(r"model\.(layers\.\d+\.)(.*)", name)
        layer, module = (inside[1], own.get(inside[2])) if inside else ("", heads.get(name))
        if module is None:
            unknown.append(name)
            continue
        targets.add(module.rsplit(".", 1)[-1])
        turned = turn(name, p, base, to_meta=True)
        own_tensors = zip(ENDINGS, (turned.A, turned.B, turned.magnitude), strict=True)
        tensors |= {f"{layer}{module}{end}": t for end, t in own_tensors if t is not None}
    if unknown:
        raise FormatError(f"torchtune does not adapt {first_few(unknown)}")
    some = next(iter(ready.sites.values()))
    config = {"r": some.rank, "lora_alpha": some.scaling * some.rank, "target_modules": sorted(targets)}
    if pairs.origin:
        config["base_model_name_or_path"] = pairs.origin
    with files.replacing(folder / TENSORS, folder / CONFIG) as (path, settings):
        files.write_tensors(path, tensors)
        files.write_json(settings, config)
    return notes
