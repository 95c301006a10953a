"""Trainings that are killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from veneer.train.loop.step import Learner


def assert_same(given: dict[str, Any], whole: Path) -> None:
    """Every figure, and every bit of the adapter, is that of the uninterrupted training."""
    out = Path(given["out"])
    assert tiny.metrics(out) == tiny.metrics(whole)
    own, other = (tiny.untimed(json.loads((f / "results.json").read_text())) for f in (out, whole))
    assert {**own, "notes": None} == {**other, "notes": None}
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert not list((out / "checkpoints").glob(".tmp-*"))


class Killed(Exception):
    pass


def killed_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """From now on the training dies as it begins that step."""
    own, taken = Learner.step, []

    def dying(*given):
        taken.append(None)
        if len(taken) > step:
            raise Killed
        return own(*given)

    patch.setattr(Learner, "step", dying)
