"""Facts about the base model that dialects need: names of modules and sizes of the attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from veneer.errors import ConfigError
from veneer.sites import own

CALLED = {  # our name -> the names in config.json of transformers' models
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "width": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
}


@dataclass(frozen=True)
class Base:
    """Facts about a base model; unknown ones are None or empty.

    names: of all modules. heads, kv_heads: numbers of query heads and of key-value heads. head: width of one
    head. width: of the residual stream. kind: transformers' model_type. transposed: layers are stored as (in,
    out).
    """

    names: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    heads: int | None = None
    kv_heads: int | None = None
    head: int | None = None
    width: int | None = None
    layers: int | None = None
    kind: str | None = None
    transposed: bool = False

    def need(self, *fields: str, why: str) -> None:
        """Raises ConfigError with those of `fields` that are unknown."""
        missing = [f for f in fields if not getattr(self, f)]
        if missing:
            raise ConfigError(
                f"{why}; {', '.join(missing)} of the base model must be known; give the base model with"
                " model="
            )

    def also(self, other: Base) -> Base:
        """Returns these facts, completed by those of `other`."""
        return replace(other, **{k: v for k, v in vars(self).items() if v})


def of_config(config: Mapping[str, Any]) -> Base:
    """Returns the facts in a config.json."""
    config = config.get("text_config") or config
    sizes: dict[str, Any] = {}
    for ours, theirs in CALLED.items():
        found = next((config[k] for k in theirs if config.get(k)), None)
        if found is not None:
            sizes[ours] = int(found)
    head = config.get("head_dim")
    if not head and {"heads", "width"} <= set(sizes):
        head = sizes["width"] // sizes["heads"]
    return Base(**sizes, head=int(head) if head else None, kind=config.get("model_type"))


def of_model(model: nn.Module) -> Base:
    """Returns the facts about a model, which may be on the meta device."""
    modules = own.base_modules(model)
    config = getattr(model, "config", None)
    known = of_config(config.to_dict()) if config is not None else Base()
    return replace(
        known,
        names=tuple(modules),
        embeddings=tuple(n for n, m in modules.items() if isinstance(m, nn.Embedding)),
        transposed=any(type(m).__name__ == "Conv1D" for m in modules.values()),
    )
