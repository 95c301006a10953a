"""Names of CLIP's text encoder: files have `text_model.` before its layers, transformers 5 has not."""

from __future__ import annotations

import re
from collections.abc import Collection

MODEL = "text_model."
# T5's layers are encoder.block.0, so that they never match.
LAYERS = re.compile(r"(text_encoder(?:_\d)?\.)((?:encoder\.layers|embeddings|final_layer_norm)\..*)")


def in_files(name: str) -> str:
    """Returns `text_encoder.text_model.encoder.layers.0..` for `text_encoder.encoder.layers.0..`."""
    return f"{found[1]}{MODEL}{found[2]}" if (found := LAYERS.fullmatch(name)) else name


def in_model(name: str, names: Collection[str]) -> str:
    """Returns the name of a file without `text_model.` where only that name is among the model's `names`."""
    short = name.replace(f".{MODEL}", ".", 1)
    return short if name not in names and short in names else name
