"""Loads base models and their processors from a folder, the hub, or the installation itself."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer import embedded, network
from veneer.compress.quantise import quantise
from veneer.errors import ConfigError, first_few
from veneer.sites import changed
from veneer.sites.own import DRAWN
from veneer.sites.roles import output_head

NO_CODE = {"trust_remote_code": False}  # and no question on the terminal either
# Auto classes of models that wrap a language model beside towers of other senses.
WRAPPERS = ("transformers.AutoModelForImageTextToText", "transformers.AutoModelForMultimodalLM")
LANGUAGE_MODEL, TOKENIZER = "transformers.AutoModelForCausalLM", "transformers.AutoTokenizer"


def source(name: str) -> str:
    """Returns the model's name for transformers: the built-in model's folder for "builtin", else the name.

    A folder of quantised layers stands for the model that they belong to.
    """
    name = changed.origin(name)
    return str(embedded.folder()) if name == embedded.PREFIX else name


def tokenizer(name: str) -> Any:
    """Returns the model's tokenizer. Raises ConfigError if it is missing."""
    return processor(name, TOKENIZER)


def processor(name: str, auto: str) -> Any:
    """Returns the model's processor, loaded by a class such as transformers.AutoTokenizer.

    Raises ConfigError.
    """
    with _found(name, "tokenizer" if auto == TOKENIZER else "processor"):
        return _class(auto).from_pretrained(source(name), **NO_CODE)


def _class(path: str) -> Any:
    """Returns the class of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def loader(auto: str, settings: Any) -> Any:
    """Returns the class that loads a model with this configuration, by a name such as AutoModelForCausalLM.

    A wrapper around a language model (LLaVA, Qwen-VL, Qwen-Audio) has an auto class of its own.
    """
    if auto == LANGUAGE_MODEL:
        found = [c for c in map(_auto, (auto, *WRAPPERS)) if c and type(settings) in c._model_mapping]
        if found:
            return found[0]
    return _class(auto)


def _auto(path: str) -> Any:
    """Returns the class, or None in releases of transformers that lack it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name, None)


def config(name: str) -> Any:
    """Returns the model's configuration. Raises ConfigError if it is missing."""
    from transformers import AutoConfig

    with _found(name, "configuration"):
        return AutoConfig.from_pretrained(source(name), **NO_CODE)


def causal_lm(name: str, dtype: torch.dtype, device: torch.device, quantised: str | None = None) -> nn.Module:
    """Returns the language model, as `model` does."""
    return model(name, LANGUAGE_MODEL, dtype, device, quantised)


def model(
    name: str,
    auto: str,
    dtype: torch.dtype,
    device: torch.device,
    quantised: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    new_head: bool = False,
) -> nn.Module:
    """Returns the model in eval mode, with the changed layers of a folder that holds such.

    auto: the class that loads it, such as transformers.AutoModelForCausalLM. quantised: the format of its
    linear layers, or None. options: further arguments of the class. new_head: draws a missing head, always
    alike, and records the names of its weights. Raises ConfigError if the model or another weight is missing.
    """
    made_from, kind = changed.origin(name), changed.kind_of_folder(name)
    if (inner := changed.kind_of_folder(made_from)) is not None and inner.whole:
        found = changed.open_whole(made_from, dtype)
        return _finished(found, name, kind, quantised, device)
    what = "causal language model" if auto == LANGUAGE_MODEL else f"model for {auto.rpartition('.')[2]}"
    given = {**(options or {}), **({"ignore_mismatched_sizes": True} if new_head else {})}
    with _found(name, what), no_bars(quiet=new_head), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # weights that are missing are drawn alike in every process
        auto_class = loader(auto, config(name)) if auto == LANGUAGE_MODEL else _class(auto)
        loaded, info = auto_class.from_pretrained(
            source(name), dtype=dtype, output_loading_info=True, **NO_CODE, **given
        )
    missing = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if new_head:
        loaded.__dict__[DRAWN], missing = _of_head(loaded, missing)
    if missing:
        raise ConfigError(
            f"model {name!r} lacks {len(missing)} weights of a {type(loaded).__name__}, which would be"
            " random:"
            f" {first_few(missing)}"
        )
    if made_from == embedded.PREFIX:
        loaded.name_or_path = name  # recorded by adapters; the folder is this machine's own
    return _finished(loaded, name, kind, quantised, device)


def _of_head(model: nn.Module, missing: list[str]) -> tuple[frozenset[str], list[str]]:
    """Returns the missing weights that a head or a pooler holds, and the others."""
    head = output_head(model)
    owners = {name: name.rpartition(".")[0] for name in missing}
    drawn = {name for name, owner in owners.items() if owner in head or "pooler" in owner.split(".")}
    return frozenset(drawn), [name for name in missing if name not in drawn]


def _finished(
    model: Any, name: str, kind: changed.Kind | None, quantised: str | None, device: torch.device
) -> nn.Module:
    """Returns the loaded model with the folder's changed layers, quantised if asked, on the device."""
    if kind is not None and not kind.whole:
        changed.load(model, name)
        model.name_or_path = name
    if quantised is not None:
        quantise(model, quantised)
    found: nn.Module = model.to(device).eval()
    return found


@contextmanager
def _found(name: str, what: str) -> Iterator[None]:
    """Raises ConfigError within the block for a model that is missing or unreadable."""
    try:
        with network.hub(source(name)):
            yield
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"model: {_missing(name, what, e)}") from e


def _missing(name: str, what: str, e: Exception) -> str:
    if "trust_remote_code" in str(e):
        return (
            f"{name!r} needs code of its own, and Veneer never runs code from a model's folder or the hub;"
            " use a model that transformers itself has, or load it in Python and call veneer.attach on it"
        )
    path, why = Path(name), f"({type(e).__name__}: {str(e).splitlines()[0]})"
    if path.is_dir() and not (path / "config.json").is_file():
        return f"the folder {path} holds no model: config.json is missing"
    if path.is_dir():
        return f"the folder {path} holds no readable {what} {why}"
    if path.is_absolute() or name.startswith("."):
        return f"the folder {path} does not exist"
    if not network.reachable():
        return f"{name!r} is neither a folder here nor in the cache, and the Hugging Face hub is out of reach"
    return f"{name!r} is not a folder here, and the Hugging Face hub has no such {what} {why}"


@contextmanager
def no_bars(*, quiet: bool = False) -> Iterator[None]:
    """Hides transformers' progress bars within the block. quiet: its warnings too, as of a missing head."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def skeleton(model: str, auto: str = LANGUAGE_MODEL) -> nn.Module:
    """Returns the model, or a pipeline of diffusers, on the meta device: names and shapes.

    Raises ConfigError if missing.
    """
    from veneer.models.diffusion import opening

    if opening.is_pipeline(model):
        return _class("veneer.models.diffusion.Diffusion").skeleton(model)  # type: ignore[no-any-return]
    settings = config(model)
    with _found(model, "language model"), torch.device("meta"):
        found: nn.Module = loader(auto, settings).from_config(settings, **NO_CODE)
    return found
