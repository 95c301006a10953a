"""Gives a base the new tokens that its adapters were trained with, and their tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from veneer.adapt.peft.settings import CONFIG
from veneer.adapt.store import manifest
from veneer.adapt.store.folder import adapter_folder
from veneer.adapt.tokens import words
from veneer.adapt.tokens.add import resize_vocabulary
from veneer.adapt.tokens.known import new_tokens
from veneer.errors import ConfigError, first_few
from veneer.files import read_json
from veneer.models import pretrained

TOKENIZER = "tokenizer_config.json"  # as transformers saves it


def tokenizer_of(found: Any, folders: Sequence[Path]) -> Any:
    """Returns the base's tokenizer `found`, with the new tokens of the adapters in these folders.

    A tokenizer that lies beside an adapter takes its place. Raises ConfigError for adapters of different
    tokens, and for a token that has another id than the adapter's row.
    """
    every = {folder: _tokens(folder) for folder in map(adapter_folder, dict.fromkeys(folders))}
    first, *others = every.items() if every else [(None, {})]
    different = [str(folder) for folder, tokens in others if tokens != first[1]]
    if different:
        raise ConfigError(
            f"adapters must have the same new tokens to share a base, got others in {first_few(different)}"
            f" than in {first[0]}; use them one at a time"
        )
    if first[0] is None or not _rows(first[0]):
        return found
    if (first[0] / TOKENIZER).is_file():
        found = pretrained.tokenizer(str(first[0]))
    elif first[1]:
        words.enter(found, list(first[1]))
    _check_ids(found, first[1], first[0])
    return found


def grown(model: nn.Module, folders: Sequence[Path], tokenizer: Any = None) -> nn.Module:
    """Returns the model with a row for every new token of the adapters in these folders.

    tokenizer: may hold more tokens than have rows of their own in an adapter.
    """
    rows = [row for folder in map(adapter_folder, folders) for row in _rows(folder)]
    if not rows:
        return model
    known = [] if tokenizer is None else tokenizer.get_vocab().values()
    return resize_vocabulary(model, max([*rows, *known]) + 1)


def _tokens(folder: Path) -> dict[str, int]:
    return new_tokens(manifest.record_of(folder))


def _rows(folder: Path) -> list[int]:
    """Returns the rows of tokens that an adapter holds, written by Veneer or by PEFT."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    given = config.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, Mapping) else [given]
    return [*(int(i) for ids in lists for i in ids), *_tokens(folder).values()]


def _check_ids(tokenizer: Any, tokens: Mapping[str, int], folder: Path) -> None:
    known = tokenizer.get_vocab()
    wrong = [f"{t!r} has the id {known.get(t)}, its row {i}" for t, i in tokens.items() if known.get(t) != i]
    if wrong:
        raise ConfigError(
            f"tokenizer must number the new tokens of {folder} as the adapter does, got {first_few(wrong)};"
            " use the tokenizer of the training"
        )
