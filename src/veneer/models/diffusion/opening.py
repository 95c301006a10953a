"""Opens a folder of diffusers: its index, the kind of its pipeline, and its parts."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from veneer import foreign
from veneer.errors import ConfigError
from veneer.models.diffusion.kind import Kind
from veneer.registry import Registry

INDEX, TASK = "model_index.json", "text-to-image"
KINDS = Registry("veneer.models.diffusion.kinds", "kind of pipeline")
# Parts of pipelines that predict or read captions.
COUNTED = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")


def is_pipeline(folder: str) -> bool:
    """Returns whether the folder holds a pipeline of diffusers."""
    return (Path(folder) / INDEX).is_file()


def kind(folder: str, trust_remote_code: bool = False) -> Kind:
    """Returns the kind of the pipeline in a folder. Raises ConfigError for one that is not trained.

    Its parts are of classes of transformers and diffusers; code in the folder never runs.
    """
    if trust_remote_code:
        raise ConfigError("model: pipelines of diffusers run no code of their folder; leave it out")
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise ConfigError(f"task {TASK!r} needs diffusers: pip install 'veneer[diffusion]'") from None
    if not is_pipeline(folder):
        raise ConfigError(f"model: the folder {folder} must hold a pipeline of diffusers; {INDEX} is missing")
    index = config(folder, INDEX)
    base: Any = Kind
    kinds: list[type[Kind]] = [KINDS.own_class(name, base) for name in KINDS.names()]
    found = next((each for each in kinds if _fits(each, index)), None)
    if found is None:
        raise ConfigError(_refusal(index, kinds))
    return found(found.SCHEDULE(config(folder, "scheduler/scheduler_config.json")), index)


def config(folder: str, file: str) -> dict[str, Any]:
    """Returns a file of settings of the folder. Raises ConfigError if it is missing or no JSON."""
    path = Path(folder) / file
    try:
        found: dict[str, Any] = foreign.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: {path} must be readable JSON ({type(e).__name__})") from None
    return found


def part(folder: str, name: str, kind: str, **options: Any) -> Any:
    """Returns a part of the pipeline, loaded by a class of transformers or diffusers."""
    return _class(name, kind).from_pretrained(folder, subfolder=name, **options)


def skeleton(folder: str, name: str, kind: str) -> Any:
    """Returns a part of the pipeline on the meta device: names and shapes."""
    made = _class(name, kind)
    with torch.device("meta"):
        if hasattr(made, "config_class"):  # of transformers
            return made(made.config_class.from_pretrained(folder, subfolder=name))
        return made.from_config(made.load_config(folder, subfolder=name))


def _class(name: str, kind: str) -> Any:
    """Returns the class of a part."""
    package = "transformers" if name.startswith(("text_encoder", "tokenizer")) else "diffusers"
    return getattr(importlib.import_module(package), kind)


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """Returns the class of a part, or None if the pipeline lacks it."""
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) else None


def _fits(each: type[Kind], index: Mapping[str, Any]) -> bool:
    own = {name: cls for name in COUNTED if (cls := _class_of(index, name)) is not None}
    return own == {**each.PARTS} and all(_class_of(index, n) for n in (*each.TOKENIZERS, "vae"))


def _refusal(index: Mapping[str, Any], kinds: list[type[Kind]]) -> str:
    """Returns the sentence on a pipeline of no kind that is trained."""
    named = [each for each in kinds if each.PIPELINE == index.get("_class_name")]
    needed = [n for each in named for n in (*each.PARTS, *each.TOKENIZERS, "vae")]
    missing = [name for name in needed if _class_of(index, name) is None]
    got = f"{index.get('_class_name')}{' without ' + ', '.join(missing) if missing else ''}"
    return (
        f"model: task {TASK!r} trains the parts of {', '.join(sorted(each.PIPELINE for each in kinds))},"
        f" got {got}; its adapters can be attached, saved and converted, but not trained here yet"
    )
