"""Files of tensors, told by their first bytes: safetensors, and torch's archives, of which only plain tensors are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import FormatError
from veneer.files import read_tensors

SAFETENSORS, TORCH = "safetensors", "torch"


def kind_of(path: Path) -> str | None:
    """What the file is by its first bytes; None for anything else."""
    if not path.is_file():
        return None
    with path.open("rb") as f:
        start = f.read(9)
    if start[:4] == b"PK\x03\x04":
        return TORCH
    return SAFETENSORS if start[8:] == b"{" and path.suffix != ".json" else None


def keys(path: Path) -> list[str]:
    """Names of the tensors in a file, without reading them. Raises FormatError for a damaged file."""
    if kind_of(path) == TORCH:
        return list(_torch(path, mmap=True))
    return _safe(path)[0]


def metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    return _safe(path)[1] if kind_of(path) == SAFETENSORS else {}


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name. Raises FormatError for a damaged file, and for a torch file with anything but tensors."""
    return _torch(path, mmap=False) if kind_of(path) == TORCH else read_tensors(path)


def _safe(path: Path) -> tuple[list[str], dict[str, str]]:
    try:
        with safe_open(path, "pt") as f:
            return list(f.keys()), dict(f.metadata() or {})
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{path} is not a whole safetensors file ({e}); restore it from a copy") from None


def _torch(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    """weights_only: nothing but tensors, numbers, texts and containers of them is built, so that no code can run."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as e:
        raise FormatError(
            f"{path} is no whole torch file of plain tensors, and nothing else is read ({str(e).splitlines()[0]})"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]  # LitGPT, Lightning
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()
    ):
        raise FormatError(f"{path} is a torch file, but not a table of names and tensors")
    return found
