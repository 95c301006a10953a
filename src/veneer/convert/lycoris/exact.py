"""Converts LoHa and LoKr between LyCORIS's files and PEFT's folders by their own tensors."""

from __future__ import annotations

from pathlib import Path

from veneer.convert.base import Base
from veneer.convert.detect import Found
from veneer.convert.lycoris import kohya, peft
from veneer.convert.lycoris.layers import TENSORS


def converted(found: Found, to: str, folder: Path, base: Base) -> tuple[int, list[int], list[str]] | None:
    """Writes the adapter into `folder`; returns the number of layers, their ranks, and notes.

    Returns None for adapters and formats other than these two. Raises the errors of both.
    """
    if found.dialect == "kohya" and to == "peft" and kohya.holds(found.file):
        layers = kohya.read(found.file, base)
        notes = peft.write(layers, folder, base)
    elif found.dialect == "peft" and to == "kohya" and found.config.get("peft_type") in TENSORS:
        layers = peft.read(found.folder, found.config)
        notes = kohya.write(layers, folder)
    else:
        return None
    ranks = {layer.rank for layer in layers.sites.values() if layer.rank is not None}
    return len(layers.sites), sorted(ranks), notes
