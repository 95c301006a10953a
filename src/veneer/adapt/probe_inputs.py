"""Inputs of the golden probe: the keyword arguments of one call of a model, as JSON and as tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attached import base_parameters
from veneer.errors import ConfigError

Record = dict[str, Any]
TOKENS, LARGEST = 16, 1 << 16
# a vocabulary that has common words at 2000 to 3000: of byte pairs, word pieces and SentencePiece alike
LARGE = 8192


def default_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Returns a fixed token sequence as keyword arguments, or None for models that take no token ids."""
    found = packed_default(model)
    return None if isinstance(found, str) else unpacked(model, found)


def _writes(model: nn.Module) -> bool:
    """Tells if the model gives logits of tokens: CLIP reads texts and pictures and writes neither."""
    find = getattr(model, "get_output_embeddings", None)
    return find is not None and find() is not None


def packed_default(model: nn.Module) -> Record | str:
    """Returns the fixed token sequence as JSON, or the reason why the model cannot take it."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config") and _writes(model):  # of models that wrap a language model
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or "input_ids" not in inspect.signature(model.forward).parameters:
        return "the model does not take token ids; pass probe= with the keyword arguments of a call"
    length = min(TOKENS, int(getattr(config, "max_position_embeddings", None) or TOKENS))
    tokens = [_common(i) if vocabulary >= LARGE else (1 + 7919 * i) % vocabulary for i in range(length)]
    ids = _packed("input_ids", torch.tensor([tokens]))
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = {"decoder_input_ids": ids} if both else {}
    return {"input_ids": ids, **decoder}


def _common(i: int) -> int:
    """Returns the i-th of a sequence of tokens that are common words in vocabularies sorted by frequency."""
    return 2000 + 367 * i % 1000


def packed(inputs: Mapping[str, Any]) -> Record:
    """Returns the inputs as JSON: tensors as dtype and numbers. Raises ConfigError for inputs that do not
    fit.
    """
    return {name: _packed(name, value) for name, value in inputs.items()}


def unpacked(model: nn.Module, record: Record) -> dict[str, Any]:
    """Returns the inputs as tensors on the model's device, floating-point ones in its dtype."""
    like = next(iter(base_parameters(model).values()))
    return {name: _unpacked(like, value) for name, value in record.items()}


def _packed(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() > LARGEST or value.is_complex():
            raise ConfigError(
                f"probe input {name!r}: must hold at most {LARGEST} real numbers, got {value.numel()}; "
                "give a smaller one"
            )
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"probe input {name!r}: must be a tensor, number, text or None, got a {type(value).__name__}"
    )


def _unpacked(like: Tensor, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    x = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=like.device)
    floating = like.dtype if like.is_floating_point() else torch.float32
    return x.to(floating) if x.is_floating_point() else x
