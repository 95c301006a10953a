"""Writes LitGPT's adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer import files
from veneer.convert.base import Base
from veneer.convert.dialects.litgpt.layout import FILE, FLAGS, FUSED, MODEL, PLAIN, SETTINGS, WHY
from veneer.convert.pairs import Pair, Pairs, bare, only, uniform
from veneer.errors import FormatError, first_few


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes lit_model.pth.lora, in torch's format because LitGPT reads no other, and hyperparameters.yaml.

    LitGPT adapts a kind of layer in every block or in none: missing layers are filled with zeros. Raises
    FormatError for layers that LitGPT does not adapt.
    """
    import yaml

    only(pairs, ("linear",), "LitGPT", magnitude=False)
    base.need("heads", "kv_heads", "head", "width", "layers", why=WHY)
    ready, notes = uniform(bare(pairs))
    tensors, flags, filled = _fused(ready.sites, base)
    some = next(iter(ready.sites.values()))
    alpha = some.scaling * some.rank
    settings = {
        "lora_r": some.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": ready.dropout,
        **flags,
    }
    with files.replacing(folder / FILE, folder / SETTINGS) as (path, hyper):
        torch.save({"model": {n: t.detach().clone() for n, t in tensors.items()}}, path)
        hyper.write_text(
            yaml.safe_dump({"checkpoint_dir": pairs.origin, "precision": None, **settings}), encoding="utf-8"
        )
    notes += (
        [f"{filled} layers without a change were filled with zeros: LitGPT adapts every layer of a kind"]
        if filled
        else []
    )
    return [
        *notes,
        f"{FILE} is a torch file, as LitGPT requires; copy {MODEL} and the tokenizer of the base into the"
        " folder",
    ]


def _fused(sites: Mapping[str, Pair], base: Base) -> tuple[dict[str, Tensor], dict[str, bool], int]:
    """Returns (tensors by LitGPT's names, lora_.. switches, number of layers filled with zeros)."""
    there = {re.sub(r"^model\.layers\.\d+\.", "", n) for n in sites}
    switch = {w: FUSED[w] in there for w in FUSED}
    kinds = [m for flag, own in FLAGS.items() if any(PLAIN[m] in there for m in own) for m in own]
    unknown = there - set(FUSED.values()) - set(PLAIN.values()) - {"lm_head"}
    if unknown:
        raise FormatError(f"LitGPT does not adapt {first_few(sorted(unknown))}")
    shapes, like, filled = _shapes(sites, base), next(iter(sites.values())), 0
    tensors: dict[str, Tensor] = {}

    def factors(layer: int, inner: str) -> tuple[Tensor, Tensor]:
        nonlocal filled
        own = sites.get(f"model.layers.{layer}.{inner}")
        if own is not None:
            return own.A, own.B
        filled += 1
        out, in_ = shapes[inner]
        return like.A.new_zeros(like.rank, in_), like.B.new_zeros(out, like.rank)

    for layer in range(base.layers or 0):
        lead = f"transformer.h.{layer}"
        parts = [factors(layer, FUSED[w]) for w in FUSED if switch[w]]
        if parts:
            tensors[f"{lead}.attn.qkv.lora_A"] = torch.cat([A for A, _ in parts])
            tensors[f"{lead}.attn.qkv.lora_B"] = torch.cat([B for _, B in parts])
        for module in kinds:
            A, B = factors(layer, PLAIN[module])
            tensors |= {f"{lead}.{module}.lora_A": A, f"{lead}.{module}.lora_B": B}
    if "lm_head" in sites:
        tensors |= {"lm_head.lora_A": sites["lm_head"].A, "lm_head.lora_B": sites["lm_head"].B}
    flags = {f"lora_{w}": on for w, on in switch.items()} | {
        f: any(m in kinds for m in own) for f, own in FLAGS.items()
    }
    return tensors, {**flags, "lora_head": "lm_head" in sites}, filled


def _shapes(sites: Mapping[str, Pair], base: Base) -> dict[str, tuple[int, int]]:
    """Returns {name in a layer: (out, in)}. Raises FormatError for pairs that do not fit the base."""
    assert base.heads and base.kv_heads and base.head and base.width and base.layers
    q, kv, width = base.heads * base.head, base.kv_heads * base.head, base.width
    mlp = {n: p for n, p in sites.items() if ".mlp." in n}
    inner = next((p.A.shape[1] if n.endswith("down_proj") else p.B.shape[0] for n, p in mlp.items()), 0)
    attention = [(q, width), (kv, width), (kv, width), (width, q)]
    shapes = [*attention, (inner, width), (inner, width), (width, inner)]
    found = dict(zip((*FUSED.values(), *PLAIN.values()), shapes, strict=True))
    wrong, last = [], f"model.layers.{base.layers}"
    for n, p in sites.items():
        layer = re.match(r"model\.layers\.(\d+)\.(.*)", n)
        if layer and int(layer[1]) >= base.layers:
            wrong.append(f"{n} (the base ends before {last})")
        elif layer and (p.B.shape[0], p.A.shape[1]) != found[layer[2]]:
            wrong.append(
                f"{n} ({p.B.shape[0]} x {p.A.shape[1]}, in the base {' x '.join(map(str, found[layer[2]]))})"
            )
    if wrong:
        raise FormatError(f"the adapter must fit the base, got {first_few(wrong)}; give the right base")
    return found
