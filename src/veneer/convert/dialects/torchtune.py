"""torchtune: lora_a, lora_b and magnitude under its own module names, rows of q and k in Meta's rotary order.

https://github.com/pytorch/torchtune, no longer maintained. Beside that form (adapter_model.pt) it exports PEFT's names
with three settings; that export turns the rows of q and k back for every model, also for those whose rows were never
turned, and leaves magnitudes as they are, so that its own form is preferred and the export refused where it is wrong.
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
MODULES = {  # torchtune's name in a layer -> transformers'
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
HEAD = {"output": "lm_head"}
# Whether torchtune turns the rows of q and k of a model of this kind (transformers' model_type).
TURNED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False, "qwen3": False}


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """The pairs in torchtune's own form, or in its export. Sizes of the attention come from `base` or config.json beside it."""
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
        raise FormatError(f"{CONFIG} and the tensors do not agree: {first_few(wrong)}")
    return Pairs(sites, origin=settings.get("base_model_name_or_path"))


def _settings(found: Found) -> dict[str, Any]:
    missing = [k for k in ("r", "lora_alpha") if k not in found.config]
    if missing:
        raise FormatError(
            f"{found.folder / CONFIG} lacks {' and '.join(missing)}, without which the scaling is not known"
        )
    return found.config


def _exported(found: Found, base: Base, tensors: Mapping[str, Tensor], rest: Leftovers) -> Pairs:
    better = f"read the folder with adapter_model.pt in it, which torchtune wrote beside {found.file.name}"
    if any(re.search(r"\.[qk]_proj\.lora_magnitude_vector", k) for k in tensors):
        raise FormatError(
            f"{found.file}: torchtune's export has the magnitudes of q and k in another order than the rows; {better}"
        )
    if (
        base.kind
        and TURNED.get(base.kind) is False
        and any(re.search(r"\.[qk]_proj\.lora_B", k) for k in tensors)
    ):
        raise FormatError(
            f"{found.file}: torchtune's export turns the rows of q and k of {base.kind} models, which never were; {better}"
        )
    dora = any("lora_magnitude_vector" in k for k in tensors)
    # torchtune's settings hold its own module names where a training was cut off, so that the tensors are what counts.
    config = {**found.config, "peft_type": "LORA", "use_dora": dora, "target_modules": None}
    return peft.read(found._replace(config=config), base, rest)


def _name(module: str) -> str:
    """ "model.layers.0.self_attn.q_proj" for "layers.0.attn.q_proj". Raises FormatError for a module it does not know."""
    layer, inner = re.fullmatch(r"(layers\.\d+\.)?(.*)", module).groups()  # type: ignore[union-attr]
    table = MODULES if layer else HEAD
    if inner not in table:
        raise FormatError(f"torchtune's module {module!r} is not known here{suggest(inner, table)}")
    return f"model.{layer}{table[inner]}" if layer else table[inner]


def turn(name: str, pair: Pair, base: Base, *, to_meta: bool) -> Pair:
    """The pair of q or k with its rows in the other rotary order; of any other module the pair itself.

    transformers rotates row i of a head with row i + head/2, Meta's code (and torchtune) row 2i with row 2i + 1.
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
            f"whether torchtune turns the rows of q and k of {base.kind} models is not known here; known: {known}"
        )
    heads, head = base.heads if which[1] == "q" else base.kv_heads, base.head
    assert heads and head
    if pair.B.shape[0] != heads * head:
        asked = f"{heads} heads of {head} ask for {heads * head}"
        raise FormatError(
            f"{name} has {pair.B.shape[0]} rows, but the base model's {asked}; is it another base?"
        )
    if not TURNED[base.kind]:
        return pair

    def rows(t: Tensor) -> Tensor:
        split = t.reshape(heads, 2, head // 2, -1) if to_meta else t.reshape(heads, head // 2, 2, -1)
        return split.transpose(1, 2).reshape(t.shape)

    return replace(pair, B=rows(pair.B), magnitude=None if pair.magnitude is None else rows(pair.magnitude))


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes torchtune's own form as safetensors, which its checkpointer reads as adapter_checkpoint: adapter_model.safetensors.

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
        layer, inner = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups()  # type: ignore[union-attr]
        module = own.get(inner) if layer else heads.get(inner)
        if module is None:
            unknown.append(name)
            continue
        targets.add(module.rsplit(".", 1)[-1])
        turned = turn(name, p, base, to_meta=True)
        own_tensors = zip(ENDINGS, (turned.A, turned.B, turned.magnitude), strict=True)
        tensors |= {f"{layer or ''}{module}{end}": t for end, t in own_tensors if t is not None}
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
