"""Reads LitGPT's adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import foreign
from veneer.convert import tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.dialects.litgpt.layout import FUSED, LLAMA_LIKE, MODEL, PLAIN, SETTINGS, heads
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pair, Pairs
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import FormatError, first_few


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """Returns the pairs of a Llama-like model; its sizes come from model_config.yaml or from `base`."""
    settings = _yaml(found.folder / SETTINGS, needed=("lora_r", "lora_alpha"))
    base = _sizes(found.folder / MODEL).also(base)
    modules = by_module(tensor_files.tensors(found.file), {".lora_A": "A", ".lora_B": "B"}, rest)
    scaling = settings["lora_alpha"] / settings["lora_r"]
    sites: dict[str, Pair] = {}
    unknown = []
    for module, roles in modules.items():
        inside = re.fullmatch(r"transformer\.h\.(\d+)\.(.*)", module)
        layer, inner = inside.groups() if inside else (None, module)
        if inner in ("attn.qkv", "attn.attn"):
            split = _split(module, roles, settings, base)
            sites |= {f"model.layers.{layer}.{n}": Pair(A, B, scaling) for n, (A, B) in split.items()}
        elif layer and inner in PLAIN:
            sites[f"model.layers.{layer}.{PLAIN[inner]}"] = Pair(roles["A"], roles["B"], scaling)
        elif not layer and inner == "lm_head":
            sites[inner] = Pair(roles["A"], roles["B"], scaling)
        else:
            unknown.append(module)
    if unknown:
        raise FormatError(
            f"{found.file}: only Llama-like models are supported, got layers {first_few(unknown)}"
        )
    # `write` fills layers without a change with zeros
    empty = tuple(n for n, p in sites.items() if not p.A.any() and not p.B.any())
    kept = {n: p for n, p in sites.items() if n not in empty}
    return Pairs(
        kept,
        dropout=float(settings.get("lora_dropout") or 0.0),
        origin=_origin(settings.get("checkpoint_dir")),
        left_out=empty,
    )


def _origin(folder: str | None) -> str | None:
    """Returns the model's id on the hub, taken from LitGPT's checkpoints/<owner>/<name>; else the folder."""
    hub = re.fullmatch(r"(?:.*/)?checkpoints/([^/]+/[^/]+)/?", folder or "")
    return hub[1] if hub else folder


def _yaml(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the settings in a YAML file. Raises FormatError if the file or one of `needed` is missing."""
    import yaml

    if not path.is_file():
        raise FormatError(
            f"{path} is missing, but the adapter's scaling depends on it; restore it from a copy"
        )
    try:
        content = foreign.yaml_of(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, ValueError) as e:
        raise FormatError(f"{path} must be plain YAML: {e}") from None
    missing = [k for k in needed if not isinstance(content, dict) or k not in content]
    if missing:
        raise FormatError(f"{path} lacks {' and '.join(missing)}")
    return dict(content)


def _sizes(path: Path) -> Base:
    """Returns the sizes in model_config.yaml. Raises FormatError for a model that is not Llama-like."""
    if not path.is_file():
        return Base()
    c = _yaml(path)
    name = str(c.get("name", ""))
    if c.get("mlp_class_name", LLAMA_LIKE[0]) not in LLAMA_LIKE or name.lower().startswith(
        ("phi-3", "phi-4")
    ):
        raise FormatError(f"{path}: only Llama-like models are supported, got {name or 'another model'}")
    n_heads, width = c.get("n_head"), c.get("n_embd")
    head = c.get("head_size") or (width // n_heads if n_heads and width else None)
    return Base(
        heads=n_heads,
        kv_heads=c.get("n_query_groups") or n_heads,
        head=head,
        width=width,
        layers=c.get("n_layer"),
    )


def _split(
    module: str, roles: Roles, settings: Mapping[str, Any], base: Base
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns {name in a layer: (A, B)} of the adapted projections among q, k and v."""
    on = [w for w in FUSED if settings.get(f"lora_{w}", w != "key")]  # LitGPT's defaults: query and value
    sizes = {w: n * head for w, n, head in zip(FUSED, *heads(base), strict=True)}
    r, A, B = settings["lora_r"], roles["A"], roles["B"]
    rows = [sizes[w] for w in on]
    if A.shape[0] != r * len(on) or tuple(B.shape) != (sum(rows), r):
        wanted = f"({r * len(on)}, ..) and ({sum(rows)}, {r}) for {' and '.join(on)} at rank {r}"
        raise FormatError(
            f"{module}: lora_A and lora_B must be {wanted}, got {tuple(A.shape)} and {tuple(B.shape)};"
            " give the right base"
        )
    if module.endswith("attn.attn") and len(on) == len(FUSED):
        return _grouped(A, B, base)
    return {FUSED[w]: (a, b) for w, a, b in zip(on, A.chunk(len(on)), B.split(rows), strict=True)}


def _grouped(A: Tensor, B: Tensor, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Splits a fused layer with interleaved heads.

    Row i of B belongs to the third of A given by its position, and to the projection given by its head.
    """
    counts, (head, *_) = heads(base)
    each = counts[0] // counts[1]
    # (rows,): index of the third of A
    block = torch.arange(3).repeat_interleave(torch.tensor([n * head for n in counts]))
    slot = torch.arange(B.shape[0]) // head % (each + 2)
    of = {"query": slot < each, "key": slot == each, "value": slot == each + 1}
    r = B.shape[1]
    wide = B.new_zeros(B.shape[0], 3, r)
    wide[torch.arange(B.shape[0]), block] = B
    found = {}
    for which, mine in of.items():
        used = [j for j in range(3) if bool((block[mine] == j).any())]
        found[FUSED[which]] = (
            torch.cat([A[j * r : (j + 1) * r] for j in used]),
            wide[mine][:, used].reshape(-1, r * len(used)),
        )
    return found
