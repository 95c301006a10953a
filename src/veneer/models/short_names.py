"""Short names of models that `make real` fetches, and where each lies."""

from __future__ import annotations

import os
from pathlib import Path

SMOLLM2 = "smollm2"
NAMES = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def place(model: str) -> str:
    """Returns the folder of a model that `make real` fetched, else its name on the Hub or the name itself."""
    for root in (os.environ.get("VENEER_REAL"), ".real"):
        if root and model in NAMES and (Path(root) / model / "config.json").is_file():
            return str(Path(root) / model)
    return NAMES.get(model, model)
