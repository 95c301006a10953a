"""Reads files of tensors: safetensors, and torch archives that hold plain tensors only.

Told apart by first bytes.
"""

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
    """Returns SAFETENSORS or TORCH by the first bytes of the file, or None for any other file."""
    if not path.is_file():
        return None
    with path.open("rb") as f:
        start = f.read(9)
    if start[:4] == b"PK\x03\x04":
        return TORCH
    return SAFETENSORS if start[8:] == b"{" and path.suffix != ".json" else None


def keys(path: Path) -> list[str]:
    """Returns the names of the tensors in a file without reading the tensors.

    Raises FormatError for a damaged file.
    """
    if kind_of(path) == TORCH:
        return list(_torch(path, mmap=True))
    return _safe(path)[0]


def metadata(path: Path) -> dict[str, str]:
    """Returns the text entries of a safetensors header; empty for other files."""
    return _safe(path)[1] if kind_of(path) == SAFETENSORS else {}


def tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a file by name.

    Raises FormatError for a damaged file and for a torch file that holds anything but tensors.
    """
    return _torch(path, mmap=False) if kind_of(path) == TORCH else read_tensors(path)


def _safe(path: Path) -> tuple[list[str], dict[str, str]]:
    try:
        with safe_open(path, "pt") as f:
            return list(f.keys()), dict(f.metadata() or {})
    except (SafetensorError, OSError) as e:
        raise FormatError(
            f"{path} is damaged or not a safetensors file ({e}); restore it from a copy"
        ) from None


def _torch(path: Path, *, mmap: bool) -> dict[str, Tensor]:
    """Loads with weights_only, so that no code in the file can run."""
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as e:
        raise FormatError(
            f"{path} is damaged or not a torch file of plain tensors; only plain tensors are read"
            f" ({str(e).splitlines()[0]})"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]  # LitGPT, Lightning
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()
    ):
        raise FormatError(f"{path} must hold a dict of names and tensors, got another object")
    return found
