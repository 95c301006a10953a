"""Checks that a language model and windows of tokens fit together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.pack import Window
from veneer.errors import ConfigError, DataError, option

PROBE = 8  # tokens of each of the two texts that are packed together


def context(model: nn.Module) -> int | None:
    """Returns the longest sequence that the model takes, in tokens; None if its configuration names none."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(model: nn.Module, length: int) -> None:
    """Raises ConfigError if the model's positions end before `length` tokens."""
    most = context(model)
    if most is not None and length > most:
        raise ConfigError(
            f"length must be at most {most}, this model's longest sequence (max_position_embeddings),"
            f" got {length}"
        )


def check_vocabulary(model: nn.Module, windows: Iterable[Window]) -> None:
    """Raises DataError if a token has no embedding in the model."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    largest = max(int(max(s.inputs.max(), s.labels.max())) for w in windows for s in w)
    if largest >= table.num_embeddings:
        raise DataError(
            f"tokens must be below {table.num_embeddings}, the model's embeddings, got {largest} from the"
            " tokenizer; use the model's own tokenizer"
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ConfigError if texts of one window see each other, or each other's positions, in this model.

    Tries it: two short texts in one window against the second after another first one, and against it alone.
    """
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    n = min(PROBE, table.num_embeddings // 3)
    first, other, second = torch.arange(3 * n, device=table.weight.device).view(3, n)
    positions = torch.arange(n, device=second.device).repeat(2)
    both = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    try:
        with evaluating(model):
            packed = _logits(model, both, positions.expand(2, -1))[:, n:]
            alone = _logits(model, second[None], None)[0]
    except TypeError as e:
        raise ConfigError(
            f"packing needs a model with position_ids, which {type(model).__name__} lacks ({e});"
            f" use {option('packing', False)}"
        ) from None
    eps = torch.finfo(next(model.parameters()).dtype).eps
    size = float(alone.abs().max())
    seen, moved = float((packed[0] - packed[1]).abs().max()), float((packed[0] - alone).abs().max())
    if seen > 4 * eps * size or moved > 32 * eps * size:
        what = "see each other" if seen > 4 * eps * size else "see their place in the window"
        raise ConfigError(
            f"in a {type(model).__name__}, texts packed into one window {what}; use"
            f" {option('packing', False)}"
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Tensor:
    inputs = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()
