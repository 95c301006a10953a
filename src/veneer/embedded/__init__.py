"""The built-in model and the interpreter's texts: the main job runs without a download."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import VeneerError

PREFIX = "builtin"


def folder() -> Path:
    """Returns the folder of the built-in model, in Hugging Face's layout.

    Raises VeneerError if the installation lacks it.
    """
    found = Path(__file__).with_name("model")
    if not (found / "config.json").is_file():
        raise VeneerError(
            f"the built-in model is missing (looked in {found}); name your own with model=, or train it:"
            f" python -m veneer.embedded.pretrain --out runs/pretrain"
        )
    return found
