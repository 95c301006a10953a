"""What layers are called in transformers' models, by what they do: endings of names."""

from __future__ import annotations

from collections.abc import Iterable

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
    """Whether the last parts of a name are one of the endings; T5's attentions are called SelfAttention,
    EncDecAttention."""
    return any(f".{name}".endswith(e if e[0].isupper() else f".{e}") for e in endings)


def _does(name: str, what: str) -> bool:
    if what == "the end of the feed-forward block" and ends(name, ATTENTION_END):
        return False  # BERT's attention.output.dense
    return ends(name, NAMES[what])
