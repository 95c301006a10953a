"""What is checked at the door: that model, text and settings fit together, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt import calls
from veneer.data.pack import Window
from veneer.errors import ConfigError, DataError, SiteError, first_few, option

PROBE = 8  # tokens of each of the two texts that are packed together for a look


def check_length(model: nn.Module, length: int) -> None:
    """Raises ConfigError if the model's positions end before `length` tokens."""
    most = context(model)
    if most is not None and length > most:
        raise ConfigError(
            f"length {length} > {most}, the longest sequence this model takes (max_position_embeddings); use at most {most}"
        )


def context(model: nn.Module) -> int | None:
    """The longest sequence that the model takes, in tokens; None where it does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: nn.Module, windows: Iterable[Window]) -> None:
    """Raises DataError if the tokenizer gave a token that the model has no embedding for."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    largest = max(int(max(s.inputs.max(), s.labels.max())) for w in windows for s in w)
    if largest >= table.num_embeddings:
        raise DataError(
            f"the tokenizer gives token {largest}, but the model has embeddings for {table.num_embeddings} tokens (0 to"
            f" {table.num_embeddings - 1}); the two do not belong together"
        )


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Raises ConfigError if, in this model, texts of one window see each other or the positions of each other.

    Found out by trying: two short texts in a window against the second one after another first one, and alone.
    """
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    n = min(PROBE, table.num_embeddings // 3)
    first, other, second = torch.arange(3 * n, device=table.weight.device).view(3, n)
    positions = torch.arange(n, device=second.device).repeat(2)
    training = model.training
    model.eval()
    try:
        packed = _logits(
            model,
            torch.stack([torch.cat([first, second]), torch.cat([other, second])]),
            positions.expand(2, -1),
        )[:, n:]
        alone = _logits(model, second[None], None)[0]
    except TypeError as e:
        raise ConfigError(
            f"this model takes no position_ids, which packing needs ({e}); use {option('packing', False)}"
        ) from None
    finally:
        model.train(training)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    size = float(alone.abs().max())
    seen, moved = float((packed[0] - packed[1]).abs().max()), float((packed[0] - alone).abs().max())
    if seen > 4 * eps * size or moved > 32 * eps * size:
        what = "see each other" if seen > 4 * eps * size else "see their place in the window"
        raise ConfigError(
            f"in a {type(model).__name__}, texts packed into one window {what}; use {option('packing', False)}"
        )


def _logits(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Tensor:
    inputs = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float()


def check_leaves(model: nn.Module, ids: Tensor) -> None:
    """Raises SiteError unless every module with parameters of its own is called with one positional argument, and only that.

    That is what a change W' - W of each module needs to act later; found out by a forward pass of ids (b, t).
    """
    leaves = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    calls: dict[str, bool] = {}

    def look(name: str) -> Any:
        return lambda module, args, kwargs: calls.update(
            {name: calls.get(name, True) and len(args) == 1 and not kwargs}
        )

    handles = [m.register_forward_pre_hook(look(n), with_kwargs=True) for n, m in leaves.items()]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for h in handles:
            h.remove()
    odd = [n for n in leaves if not calls.get(n, False)]
    if odd:
        raise SiteError(
            f"method 'full' keeps what was learned as a change of each module, which must be called with one input alone; in this model"
            f" {len(odd)} modules are not: {first_few(odd)}. Use an adapter, such as method 'lora'"
        )


@torch.no_grad()
def check_called(model: nn.Module, ids: Tensor) -> None:
    """Raises SiteError, naming them, if adapted layers are not called in a forward pass of ids (b, t)."""
    model(input_ids=ids, use_cache=False)
    calls.check_called(model)
