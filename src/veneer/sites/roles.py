"""Names of layers in models of transformers and diffusers, by what the layers do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from veneer.errors import SiteError
from veneer.sites.own import base_modules

KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "key_proj",
    "value_proj",
    "self.key",
    "self.value",
    "Attention.k",
    "Attention.v",
)
# The layer that ends an attention block, and the one that ends a feed-forward block.
ATTENTION_END = (
    "o_proj",
    "attn.out_proj",
    "attn.c_proj",
    "attention.output.dense",
    "attention.dense",
    "Attention.o",
)
FEEDFORWARD_END = (
    "down_proj",
    "fc2",
    "fc_out",
    "mlp.c_proj",
    "dense_4h_to_h",
    "DenseReluDense.wo",
    "output.dense",
)
FEEDFORWARD = ("mlp", "feed_forward", "ffn", "DenseReluDense")  # the whole block

NAMES = {
    "keys and values": KEYS_AND_VALUES,
    "the end of the attention block": ATTENTION_END,
    "the end of the feed-forward block": FEEDFORWARD_END,
    "the feed-forward block": FEEDFORWARD,
}


def called(model: nn.Module, *what: str, hint: str) -> list[str]:
    """Names of the modules that do `what`, keys of NAMES, in the model's order.

    Raises SiteError, which ends with the hint, if one of them is not known in this model.
    """
    names = list(base_modules(model))
    found = {w: [n for n in names if _does(n, w)] for w in what}
    unknown = [w for w, hits in found.items() if not hits]
    if unknown:
        raise SiteError(
            f"the layers of {' and '.join(unknown)} are not known in a {type(model).__name__}; {hint}"
        )
    chosen = {n for hits in found.values() for n in hits}
    return [n for n in names if n in chosen]


def ends(name: str, endings: Iterable[str]) -> bool:
    """Returns True if the name ends in one of the endings.

    T5's attentions are SelfAttention, EncDecAttention.
    """
    return any(f".{name}".endswith(e if e[0].isupper() else f".{e}") for e in endings)


def _does(name: str, what: str) -> bool:
    if what == "the end of the feed-forward block" and ends(name, ATTENTION_END):
        return False  # BERT's attention.output.dense
    return ends(name, NAMES[what])


def output_head(model: nn.Module) -> set[str]:
    """Returns the names of the layers that turn features into outputs.

    These lie outside a transformers model's base model, or are what the model calls its output embeddings.
    """
    inner, own = getattr(model, "base_model", None), set[int]()
    if isinstance(inner, nn.Module) and inner is not model:
        own = {id(m) for m in model.modules()} - {id(m) for m in inner.modules()}
    own |= {id(m) for m in [embeddings(model, "output")] if m is not None}
    return {n for n, m in model.named_modules() if id(m) in own}


def embeddings(model: nn.Module, end: str) -> nn.Module | None:
    """Returns a transformers model's embeddings at one end, "input" or "output", or None without such."""
    get: Any = getattr(model, f"get_{end}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:  # of models of images
        return None
    return found if isinstance(found, nn.Module) else None


# Expressions for one step of a dotted name. A layer plays a role if a step of its name matches.
ROLES = {
    "attention": r"(\w*_)?attn\d*|\w*[aA]ttention|SelfAttention|EncDecAttention",
    "mlp": r"mlp\w*|ffn\w*|ff(_context)?|feed_?forward\w*|DenseReluDense|fc\d|intermediate|output|pwconv\d",
    "experts": r"experts?|shared_experts?|block_sparse_moe",
    "text": r"text_\w+|language_model|lm",
    "vision": r"vision_\w+|visual\w*|vision|image_encoder",
    "encoder": r"encoder",
    "decoder": r"decoder",
}
WITHOUT = {"mlp": ("attention", "experts")}  # such as BERT's attention.output.dense


def plays(name: str, role: str) -> bool:
    """Tells if a layer of this dotted name plays a role, a key of ROLES."""
    if any(plays(name, other) for other in WITHOUT.get(role, ())):
        return False
    return any(re.fullmatch(ROLES[role], step) for step in name.split("."))


def resolved(model: nn.Module, target: str | Sequence[str], kinds: Mapping[str, str]) -> str | Sequence[str]:
    """Returns the target with the names of its layers in place of every role.

    A role is a key of ROLES, alone or in a list, unless a linear layer is called so. It stands for linear
    layers, or for convolutions in a model without such; "experts" for matrices of fused experts too.
    kinds: of the layers outside the output head, by name. Raises SiteError for a role that no layer plays.
    """
    alone = isinstance(target, str)
    entries = [target] if isinstance(target, str) else list(target)
    if not any(entry in ROLES for entry in entries):
        return target
    linear = [n for n, kind in kinds.items() if kind in ("linear", "transposed")]
    layers = linear or [n for n, kind in kinds.items() if kind == "conv"]
    roles = [e for e in entries if e in ROLES and not any(f".{n}".endswith(f".{e}") for n in layers)]
    if not roles:
        return target
    bare = [n for n, kind in kinds.items() if kind == "parameter"]
    found = {role: [n for n in layers + bare * (role == "experts") if plays(n, role)] for role in roles}
    missing = [role for role, names in found.items() if not names]
    if missing:
        raise SiteError("\n".join(_missing(model, role) for role in missing))
    rest = [e for e in entries if e not in roles]
    chosen = list(dict.fromkeys(n for names in found.values() for n in names))
    return chosen if alone else [*rest, *chosen]


def without_idle(
    given: str | Sequence[str], found: str | Sequence[str], wanted: Sequence[str]
) -> str | Sequence[str]:
    """Returns resolved entries without a role's layers that are not wanted anyway, unless none of them is."""
    if found is given:
        return given
    kept = [name for name in found if name in wanted or name in given]
    return kept or found


def _missing(model: nn.Module, role: str) -> str:
    modules = base_modules(model).items()
    bare = [n for n, m in modules if plays(n, role) and any(True for _ in m.parameters(recurse=False))]
    if role == "experts" and bare:
        return (
            f"{role!r}: the experts are parameters of {bare[0]!r} in an unknown layout; name other roles or"
            " layers"
        )
    return f"no layer of a {type(model).__name__} plays the role {role!r}; name layers"
