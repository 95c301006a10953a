"""Which dialect an adapter is written in: by the keys of its settings and tensors, not by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.adapt.peft.settings import CONFIG
from veneer.adapt.store import manifest, native
from veneer.convert import tensor_files
from veneer.errors import FormatError, first_few
from veneer.files import read_json

NATIVE = "veneer"  # our own layout, for changes that no other dialect can express

# The dialect is that of the first expression that the whole name of any tensor matches.
SIGNS = [
    ("peft", r"base_model\.model\..*"),
    ("kohya", r"(lora_(unet|te\d?|transformer)|lycoris)_[^.]+\..+"),
    ("torchtune", r".*\.(lora_[ab]\.weight|magnitude)"),
    ("mlx", r".*\.lora_[ab]"),
    ("litgpt", r"(transformer\.h\.\d+\..+|lm_head)\.lora_[AB]"),
    ("diffusers", r".*(lora_[AB]\.weight|[._]lora\.(up|down)\.weight|lora_linear_layer\.(up|down)\.weight)"),
]
THREE = {"r", "lora_alpha", "target_modules", "base_model_name_or_path"}
TEXTS = {"peft": "PEFT", "torchtune": "torchtune", "mlx": "mlx-lm"}


class Found(NamedTuple):
    """dialect: its name here; file: of the tensors; folder: where its settings lie; config: adapter_config.json, or {}."""

    dialect: str
    file: Path
    folder: Path
    config: dict[str, Any]


def of_settings(config: Mapping[str, Any]) -> str | None:
    """Which of the four dialects that call their settings adapter_config.json has written this one."""
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "mlx"
    if {"r", "lora_alpha", "target_modules"} <= set(config) <= THREE:
        return "torchtune"
    if "peft_type" in config:
        return "peft"
    if isinstance(config.get("config"), Mapping) or {"hidden_size", "model_type"} <= set(config):
        return "hub"
    return None


def of_names(names: Iterable[str]) -> str | None:
    """The dialect whose tensors are called like these, or None."""
    every = list(names)
    return next((dialect for dialect, sign in SIGNS if any(re.fullmatch(sign, n) for n in every)), None)


def detect(path: Path) -> Found:
    """What adapter lies at `path`, a folder or a file of tensors.

    Raises FormatError where there is none, where settings and tensors are of different dialects, and where several
    files could be meant.
    """
    if not path.exists():
        raise FormatError(f"there is nothing at {path}")
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    said = of_settings(config) if config else None
    if said == "hub":
        raise FormatError(
            f"{folder / CONFIG} is of the adapters library, which has names of its own; merge it there, keep the merged model"
        )
    own = folder / native.TENSORS
    if (
        path in (folder, own)
        and own.is_file()
        and (manifest.read(folder) or {}).get("layout") == manifest.NATIVE
    ):
        return Found(NATIVE, own, folder, {})
    files = [f for f in ([path] if path.is_file() else sorted(folder.iterdir())) if tensor_files.kind_of(f)]
    known, unread = _dialects(files)
    if not known and unread:
        raise unread[0]
    if not known:
        if not files:
            raise FormatError(f"{path} holds no adapter: no file of tensors lies there")
        there = first_few(f.name for f in files)
        raise FormatError(
            f"{path} holds no adapter of a dialect known here: no tensor in {there} is called like one's"
        )
    file = _choose(folder, known)
    dialect = known[file]
    if said and {said, dialect} == {"torchtune", "peft"}:
        dialect = "torchtune"  # which exports PEFT's names with three settings; later versions add peft_type
    elif said and said != dialect:
        raise FormatError(
            f"{folder / CONFIG} is {TEXTS[said]}'s, but the tensors in {file.name} are called like those of {dialect}"
        )
    return Found(dialect, file, folder, config)


def _dialects(files: Iterable[Path]) -> tuple[dict[Path, str], list[FormatError]]:
    """The dialect of every file that is an adapter's, and why others, such as a trainer's state, could not be read."""
    known, unread = {}, []
    for file in files:
        try:
            found = of_names(tensor_files.keys(file))
        except FormatError as e:
            unread.append(e)
            continue
        if found:
            known[file] = found
    return known, unread


def _choose(folder: Path, known: Mapping[Path, str]) -> Path:
    """The one file of tensors. torchtune writes the same adapter twice or thrice: its own form is the one without faults."""
    files = list(known)
    own = [f for f in files if known[f] == "torchtune"]
    if len(own) == 1 and set(known.values()) <= {"torchtune", "peft"}:
        return own[0]
    safe = [f for f in files if tensor_files.kind_of(f) == tensor_files.SAFETENSORS]
    if len(files) > 1 and len(safe) == 1 and len(set(known.values())) == 1:
        return safe[0]
    if len(files) > 1:
        raise FormatError(
            f"{folder} holds several adapters; name the file of one: {first_few(f.name for f in files)}"
        )
    return files[0]
