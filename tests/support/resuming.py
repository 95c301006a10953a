"""Trainings that are killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from veneer.files import left_over
from veneer.runs.fit import fit
from veneer.train.loop.step import Learner
from veneer.train.run import Run

WRITTEN = ("adapter", "compressed", "base")  # folders of a run with the weights that it makes
FOUND = {"base_parameters", "dial", "layers", "preview", "samples", "examined", "answers"}  # by a report


def resumes_bit_for_bit(
    given: dict[str, Any], reference: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A training killed before `step` goes on to the figures and bits of one that was not.

    reference: that one's folder; trains it where it is missing.
    """
    if not reference.exists():
        fit(Run.from_dict({**given, "out": str(reference)}), progress=False)
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(Killed):
            fit(Run.from_dict(given), progress=False)
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    assert_same(given, reference)


def assert_same(given: dict[str, Any], whole: Path) -> None:
    """Every figure, and every bit of the adapter, is that of the uninterrupted training.

    Findings of a report that the uninterrupted one alone has are left out.
    """
    out = Path(given["out"])
    assert tiny.metrics(out) == tiny.metrics(whole)
    own, other = (tiny.untimed(json.loads((f / "results.json").read_text())) for f in (out, whole))
    expected = {k: v for k, v in other.items() if k in own or k not in FOUND}
    assert {**own, "notes": None} == {**expected, "notes": None}
    written = [p.relative_to(whole) for folder in WRITTEN for p in (whole / folder).glob("*.safetensors")]
    assert any(p.parts[0] == "adapter" for p in written)
    assert [str(p) for p in written if (out / p).read_bytes() != (whole / p).read_bytes()] == []
    assert not list((out / "checkpoints").glob(".tmp-*")) and left_over(out) == []


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
