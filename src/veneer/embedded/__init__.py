"""The built-in model, and the texts that every Python interpreter carries: the main job runs with no download."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import VeneerError

PREFIX = "builtin"


def folder() -> Path:
    """The folder of the built-in model, in Hugging Face's layout. Raises VeneerError where the installation has none."""
    found = Path(__file__).with_name("model")
    if not (found / "config.json").is_file():
        raise VeneerError(
            f"this installation has no built-in model (looked in {found}); name one of your own with model=, or train it:"
            f" python -m veneer.embedded.pretrain --out runs/pretrain"
        )
    return found
