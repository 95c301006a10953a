"""Real pretrained models for tests marked `real`, from the folder that `make real` fills."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def folder(key: str) -> Path | None:
    """Returns the folder of one model or data set, or None if it was not fetched."""
    found = Path(os.environ.get("VENEER_REAL") or ROOT / ".real") / key
    return found if (found / "OK").is_file() else None


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """A function from a key to its folder; skips the test, or fails it under `make test-real`, without it."""

    def found(key: str) -> Path:
        path = folder(key)
        if path is None:
            text = f"real model {key!r} is missing; run `make real KEYS={key}`"
            pytest.fail(text) if os.environ.get("VENEER_REAL_REQUIRED") else pytest.skip(text)
        return path

    return found
