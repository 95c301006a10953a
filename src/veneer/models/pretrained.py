"""Base models and their tokenizers, from a folder, the hub, or the installation itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import embedded
from veneer.compress.quantise import quantise
from veneer.errors import ConfigError, first_few
from veneer.sites import changed


def source(name: str) -> str:
    """What transformers calls the model: the built-in model's folder for "builtin", else the name itself.

    A folder of quantised layers stands for the model that they belong into.
    """
    name = changed.origin(name)
    return str(embedded.folder()) if name == embedded.PREFIX else name


def tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises ConfigError if there is none."""
    from transformers import AutoTokenizer

    with _said_well(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(source(name))


def config(name: str) -> Any:
    """The model's configuration. Raises ConfigError if there is none."""
    from transformers import AutoConfig

    with _said_well(name, "configuration"):
        return AutoConfig.from_pretrained(source(name))


def causal_lm(name: str, dtype: torch.dtype, device: torch.device, quantised: str | None = None) -> nn.Module:
    """The language model in eval mode, with the quantised layers of the folder if it is one of them.

    quantised: the format that its linear layers are kept in. Raises ConfigError if there is none, or if weights are missing
    from it.
    """
    from transformers import AutoModelForCausalLM

    made_from, kind = changed.origin(name), changed.kind_of_folder(name)
    if (inner := changed.kind_of_folder(made_from)) is not None and inner.whole:
        found = changed.open_whole(made_from, dtype)
        return _finished(found, name, kind, quantised, device)
    with _said_well(name, "causal language model"), no_bars():
        model, info = AutoModelForCausalLM.from_pretrained(
            source(name), dtype=dtype, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"model {name!r} lacks {len(missing)} weights of a {type(model).__name__}, which would be random:"
            f" {first_few(missing)}"
        )
    if made_from == embedded.PREFIX:
        model.name_or_path = name  # what adapters record; the folder is this machine's own
    return _finished(model, name, kind, quantised, device)


def _finished(
    model: Any, name: str, kind: changed.Kind | None, quantised: str | None, device: torch.device
) -> nn.Module:
    """The loaded model with the folder's changed layers, quantised if asked, on the device."""
    if kind is not None and not kind.whole:
        changed.load(model, name)
        model.name_or_path = name
    if quantised is not None:
        quantise(model, quantised)
    found: nn.Module = model.to(device).eval()
    return found


@contextmanager
def _said_well(name: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as e:
        path, why = Path(name), f" ({type(e).__name__}: {str(e).splitlines()[0]})"
        if path.is_dir() and not (path / "config.json").is_file():
            where, why = f"the folder {path} holds no model: it has no config.json", ""
        elif path.is_dir():
            where = f"the folder {path} holds no {what} that can be read"
        elif path.is_absolute() or name.startswith("."):
            where, why = f"there is no folder {path}", ""
        else:
            where = f"{name!r} is no folder here, and no {what} of that name could be had from the Hugging Face hub"
        raise ConfigError(f"model: {where}{why}") from e


@contextmanager
def no_bars() -> Iterator[None]:
    """Within the block transformers shows no progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def skeleton(model: str) -> nn.Module:
    """The language model on the meta device: all names and shapes, and no weights. Raises ConfigError if there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source(model))
        with torch.device("meta"):
            found: nn.Module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"model: no language model is described at {model!r} ({str(e).splitlines()[0]})"
        ) from None
    return found
