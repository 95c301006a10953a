"""Detects the dialect of an adapter by the keys of its settings and tensors, not by file names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer.adapt.peft.settings import CONFIG
from veneer.adapt.store import manifest, native
from veneer.convert import tensor_files
from veneer.convert.tensor_roles import LYCORIS
from veneer.errors import FormatError, first_few
from veneer.files import read_json

NATIVE = "veneer"  # our own layout, for changes that no other dialect can express

# The first expression that matches the whole name of any tensor decides.
SIGNS = [
    ("peft", r"base_model\.model\..*"),
    ("kohya", r"(lora_(unet|te\d?|transformer)|lycoris)_[^.]+\..+"),
    ("torchtune", r".*\.(lora_[ab]\.weight|magnitude)"),
    ("mlx", r".*\.lora_[ab]"),
    ("litgpt", r"(transformer\.h\.\d+\..+|lm_head)\.lora_[AB]"),
    ("diffusers", r".*(lora_[AB]\.weight|[._]lora\.(up|down)\.weight|lora_linear_layer\.(up|down)\.weight)"),
    # ComfyUI, ai-toolkit, musubi-tuner: real names with kohya's endings
    ("diffusers", rf".*\.(lora_(up|down)\.weight|{LYCORIS})"),
]
THREE = {"r", "lora_alpha", "target_modules", "base_model_name_or_path"}
TEXTS = {"peft": "PEFT", "torchtune": "torchtune", "mlx": "mlx-lm"}


class Found(NamedTuple):
    """A detected adapter.

    dialect: its name here. file: of the tensors. folder: of the settings. config: adapter_config.json, or {}.
    """

    dialect: str
    file: Path
    folder: Path
    config: dict[str, Any]


def of_settings(config: Mapping[str, Any]) -> str | None:
    """Returns which of the four programs that write an adapter_config.json wrote this one, or None."""
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
    """Returns the dialect whose tensors have names like these, or None."""
    every = list(names)
    return next((dialect for dialect, sign in SIGNS if any(re.fullmatch(sign, n) for n in every)), None)


def detect(path: Path) -> Found:
    """Returns the adapter at `path`, a folder or a file of tensors.

    Raises FormatError if no adapter is found, if settings and tensors are of different dialects, and if
    several files could be meant.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist; give a folder or a file of tensors")
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    program = of_settings(config) if config else None
    if program == "hub":
        raise FormatError(
            f"{folder / CONFIG} is written by AdapterHub's adapters library, which is not supported;"
            " merge the adapter there and keep the merged model"
        )
    own = folder / native.TENSORS
    if path in (folder, own) and own.is_file() and _is_native(folder):
        return Found(NATIVE, own, folder, {})
    file, dialect = _adapter_file(path)
    if program and {program, dialect} == {"torchtune", "peft"}:
        # torchtune exports PEFT's names with three settings; later versions add peft_type
        dialect = "torchtune"
    elif program and program != dialect:
        raise FormatError(
            f"{folder / CONFIG} is written by {TEXTS[program]}, but the tensors in {file.name} have names of"
            f" {dialect}"
        )
    return Found(dialect, file, folder, config)


def _is_native(folder: Path) -> bool:
    return (manifest.record_of(folder) or {}).get("layout") == manifest.NATIVE


def _adapter_file(path: Path) -> tuple[Path, str]:
    """Returns the file of tensors at `path` and its dialect.

    Raises FormatError unless there is exactly one.
    """
    files = [f for f in ([path] if path.is_file() else sorted(path.iterdir())) if tensor_files.kind_of(f)]
    known, unread = _dialects(files)
    if not known and unread:
        raise unread[0]
    if not known:
        if not files:
            raise FormatError(f"{path} holds no adapter: it has no file of tensors")
        there = first_few(f.name for f in files)
        raise FormatError(
            f"{path} holds no adapter of a supported dialect: no tensor in {there} has a name of one"
        )
    file = _choose(path, known)
    return file, known[file]


def _dialects(files: Iterable[Path]) -> tuple[dict[Path, str], list[FormatError]]:
    """Returns the dialects of adapter files, and the errors of unreadable files (a trainer's state)."""
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
    """Returns the file to read; of torchtune's up to three copies its own form, the only correct one."""
    files = list(known)
    own = [f for f in files if known[f] == "torchtune"]
    if len(own) == 1 and set(known.values()) <= {"torchtune", "peft"}:
        return own[0]
    safe = [f for f in files if tensor_files.kind_of(f) == tensor_files.SAFETENSORS]
    if len(files) > 1 and len(safe) == 1 and len(set(known.values())) == 1:
        return safe[0]
    if len(files) > 1:
        raise FormatError(
            f"{folder} holds several adapters; give the file of one: {first_few(f.name for f in files)}"
        )
    return files[0]
