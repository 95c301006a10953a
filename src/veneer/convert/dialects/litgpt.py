"""LitGPT: lit_model.pth.lora, a torch file, with q, k and v as one layer; settings in hyperparameters.yaml.

https://github.com/Lightning-AI/litgpt. lora_A (r * n, in) holds the A of the n adapted ones of q, k, v one below the
other, lora_B (out of these, r) their B. Until 0.5.3 (`attn.attn`) the fused layer held the heads in groups, q.. k v q..
k v, but with all three adapted its rows still took q's A first, then k's, then v's: each projection then mixes all
three, which pairs of rank up to 3r hold exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import files
from veneer.convert import tensor_files
from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.leftovers import Leftovers
from veneer.convert.pairs import Pair, Pairs, bare, only, uniform
from veneer.convert.tensor_roles import Roles, by_module
from veneer.errors import FormatError, first_few

FILE, SETTINGS, MODEL = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"
FUSED = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
PLAIN = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
FLAGS = {"lora_projection": ("attn.proj",), "lora_mlp": ("mlp.fc_1", "mlp.fc_2", "mlp.proj")}
LLAMA_LIKE = ("LLaMAMLP", "GemmaMLP")
WHY = "LitGPT holds q, k and v in one layer"


def read(found: Found, base: Base, rest: Leftovers) -> Pairs:
    """The pairs of a model of Llama's kind. Its sizes come from model_config.yaml beside the file, or from `base`."""
    settings = _yaml(found.folder / SETTINGS, needed=("lora_r", "lora_alpha"))
    base = _sizes(found.folder / MODEL).also(base)
    modules = by_module(tensor_files.tensors(found.file), {".lora_A": "A", ".lora_B": "B"}, rest)
    scaling = settings["lora_alpha"] / settings["lora_r"]
    sites: dict[str, Pair] = {}
    unknown = []
    for module, roles in modules.items():
        layer, inner = re.fullmatch(r"(?:transformer\.h\.(\d+)\.)?(.*)", module).groups()  # type: ignore[union-attr]
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
        raise FormatError(f"{found.file} is of a model that is not of Llama's kind: {first_few(unknown)}")
    empty = tuple(
        n for n, p in sites.items() if not p.A.any() and not p.B.any()
    )  # layers that were not adapted, see write
    kept = {n: p for n, p in sites.items() if n not in empty}
    return Pairs(
        kept,
        dropout=float(settings.get("lora_dropout") or 0.0),
        origin=_origin(settings.get("checkpoint_dir")),
        left_out=empty,
    )


def _origin(folder: str | None) -> str | None:
    """The model's id on the hub, by which LitGPT names its folder: checkpoints/<owner>/<name>; else the folder."""
    hub = re.fullmatch(r"(?:.*/)?checkpoints/([^/]+/[^/]+)/?", folder or "")
    return hub[1] if hub else folder


def _yaml(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings in a YAML file. Raises FormatError where it, or one of `needed`, is missing."""
    import yaml

    if not path.is_file():
        raise FormatError(f"there is no {path}, without which the adapter's scaling is not known")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise FormatError(f"{path} is not plain YAML: {e}") from None
    missing = [k for k in needed if not isinstance(content, dict) or k not in content]
    if missing:
        raise FormatError(f"{path} lacks {' and '.join(missing)}")
    return dict(content)


def _sizes(path: Path) -> Base:
    """What model_config.yaml says. Raises FormatError for a model that is not of Llama's kind."""
    if not path.is_file():
        return Base()
    c = _yaml(path)
    name = str(c.get("name", ""))
    if c.get("mlp_class_name", LLAMA_LIKE[0]) not in LLAMA_LIKE or name.lower().startswith(
        ("phi-3", "phi-4")
    ):
        raise FormatError(
            f"{path}: {name or 'the model'} is not of Llama's kind, whose layers alone are known here"
        )
    heads, width = c.get("n_head"), c.get("n_embd")
    head = c.get("head_size") or (width // heads if heads and width else None)
    return Base(
        heads=heads,
        kv_heads=c.get("n_query_groups") or heads,
        head=head,
        width=width,
        layers=c.get("n_layer"),
    )


def _split(
    module: str, roles: Roles, settings: Mapping[str, Any], base: Base
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the adapted ones of q, k and v by their name in a layer."""
    on = [w for w in FUSED if settings.get(f"lora_{w}", w != "key")]  # LitGPT's defaults: query and value
    sizes = {w: n * head for w, n, head in zip(FUSED, *_heads(base), strict=True)}
    r, A, B = settings["lora_r"], roles["A"], roles["B"]
    rows = [sizes[w] for w in on]
    if A.shape[0] != r * len(on) or tuple(B.shape) != (sum(rows), r):
        asked = f"{' and '.join(on)} at rank {r} ask for {(r * len(on), '..')} and {(sum(rows), r)}"
        raise FormatError(
            f"{module}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, but {asked}; is it of another base?"
        )
    if module.endswith("attn.attn") and len(on) == len(FUSED):
        return _grouped(A, B, base)
    return {FUSED[w]: (a, b) for w, a, b in zip(on, A.chunk(len(on)), B.split(rows), strict=True)}


def _heads(base: Base) -> tuple[list[int], list[int]]:
    base.need("heads", "kv_heads", "head", why=WHY)
    assert base.heads and base.kv_heads and base.head
    return [base.heads, base.kv_heads, base.kv_heads], [base.head] * 3


def _grouped(A: Tensor, B: Tensor, base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Of a fused layer in groups: row i of B goes with the block of A that its place says, to the projection its head says."""
    counts, (head, *_) = _heads(base)
    each = counts[0] // counts[1]
    block = torch.arange(3).repeat_interleave(
        torch.tensor([n * head for n in counts])
    )  # (rows,): which third of A
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


def write(pairs: Pairs, folder: Path, base: Base) -> list[str]:
    """Writes lit_model.pth.lora, in torch's format because LitGPT reads no other, and hyperparameters.yaml.

    LitGPT adapts a kind of layer in all layers or in none: what is missing is filled with zeros. Raises FormatError for
    layers that it does not adapt.
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
        [f"{filled} layers without a change were filled with zeros: LitGPT adapts all layers of a kind"]
        if filled
        else []
    )
    return [
        *notes,
        f"{FILE} is a torch file, as LitGPT asks; put {MODEL} and the tokenizer of the base beside it",
    ]


def _fused(sites: Mapping[str, Pair], base: Base) -> tuple[dict[str, Tensor], dict[str, bool], int]:
    """(tensors by LitGPT's names, lora_.. switches, how many layers were filled with zeros)."""
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
    """(out, in) of the layers by their name in a layer. Raises FormatError for pairs of other sizes than the base's."""
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
            wrong.append(f"{n}: the base ends before {last}")
        elif layer and (p.B.shape[0], p.A.shape[1]) != found[layer[2]]:
            wrong.append(
                f"{n} is {p.B.shape[0]} x {p.A.shape[1]}, in the base {' x '.join(map(str, found[layer[2]]))}"
            )
    if wrong:
        raise FormatError(f"the adapter is not one of this base: {first_few(wrong)}")
    return found
