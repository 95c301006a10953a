"""A self-attention of a transformers model, whose keys and values can be added to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.errors import NotMergeable, SiteError
from veneer.sites.base import Site


class AttentionSite(Site):
    """W is (kv_heads head_dim, 0): there is nothing to merge into. Changes act inside the attention, not by a
    hook on it."""

    kind = "attention"
    is_matrix = False
    acts_by_hook = False

    def __init__(self, name: str, module: nn.Module) -> None:
        if not is_self_attention(module):
            raise SiteError(
                f"{name!r} is a {type(module).__name__}, and no self-attention of a transformers model"
            )
        self.heads, self.head_dim = _heads(module)
        super().__init__(name, module)
        self.in_ = self.out

    def weight(self) -> Tensor:
        first: Tensor = next(
            p for p in self.module.parameters() if p.is_floating_point()
        )  # packed weights have whole numbers too
        return first.new_empty(self.heads * self.head_dim, 0)

    def set_weight(self, W: Tensor) -> None:
        raise NotMergeable(
            f"{self.name!r} is an attention, which has no weight to write keys and values to; keep the"
            f" adapter"
        )

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        raise NotMergeable(f"{self.name!r} is an attention, in which no matrix takes the place of another")

    def drop(self, x: Tensor, p: float) -> Tensor:
        return x

    def shift(self) -> Tensor | None:
        return None


def is_self_attention(module: Any) -> bool:
    """Returns True for a self-attention of transformers: a module with a config, heads and `is_causal`."""
    crossed = getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__
    knows = all(getattr(module, name, None) is not None for name in ("config", "is_causal"))
    return knows and not crossed and _head_dim(module) is not None


def _head_dim(module: Any) -> int | None:
    return getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)


def _heads(module: Any) -> tuple[int, int]:
    heads = getattr(module.config, "num_key_value_heads", None) or module.config.num_attention_heads
    return heads, int(_head_dim(module) or 0)
