"""Runs of one process share texts, base and first evaluation, and learn what they would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny

from veneer.adapt.attached import base_parameters
from veneer.files import read_json
from veneer.models import machine
from veneer.runs import shared as sharing
from veneer.runs.decide import decided
from veneer.runs.fit import fit, fit_until
from veneer.runs.prepare import read
from veneer.runs.shared import Shared
from veneer.train.loop.loop import Loop
from veneer.train.loop.progress import Notes
from veneer.train.run import Run


def of(folder, name, **changed):
    own = {"out": str(folder / name), "steps": 4, "eval_every": 2, "accumulate": 1, "resume": True}
    return Run.from_dict(tiny.settings(folder, **{**own, "report": False, **changed}))


def losses(folder):
    return [line.get("loss") for line in tiny.metrics(folder)]


def test_rungs_and_trials_learn_what_they_would_alone(tmp_path, monkeypatch):
    measured, loaded, shared = [], [], Shared()
    measure, load = Loop.measure, sharing.for_task
    monkeypatch.setattr(Loop, "measure", lambda loop, names: measured.append(names) or measure(loop, names))
    monkeypatch.setattr(sharing, "for_task", lambda *given: loaded.append(given) or load(*given))
    for lr in (1e-2, 1e-3):
        for step in (2, 4):
            fit_until(of(tmp_path, f"shared-{lr}", lr=lr), step, shared=shared)
    assert len(loaded) == 1 and sum("known" in names and "valid" in names for names in measured) == 5
    for lr in (1e-2, 1e-3):
        fit(of(tmp_path, f"alone-{lr}", lr=lr, resume=False), progress=False)
        one, other = (tmp_path / f"{kind}-{lr}" for kind in ("shared", "alone"))
        assert losses(one) == losses(other)
        assert all(read_json(one / "results.json")[k] == read_json(other / "results.json")[k] for k in
                   ("before", "after", "learned", "forgotten"))  # fmt: skip


@pytest.mark.parametrize("changed", [{"method": "full", "options": {}}, {"quantise": "int8"}])
def test_a_run_that_changes_the_base_has_its_own(tmp_path, changed):
    run = decided(of(tmp_path, "a", **changed), machine.device("cpu"))
    run, task, _ = read(run, Notes())
    assert Shared().base(run, task, torch.float32, torch.device("cpu")) is None


def test_a_base_that_was_written_to_is_loaded_again(tmp_path):
    run = decided(of(tmp_path, "a"), machine.device("cpu"))
    run, task, _ = read(run, Notes())
    shared, given = Shared(), (torch.float32, torch.device("cpu"))
    first, second = (shared.base(run, task, *given) for _ in range(2))
    assert first is not None and second is not None and first is not second
    pairs = list(zip(base_parameters(first).values(), base_parameters(second).values(), strict=True))
    assert all(a is b for a, b in pairs)
    with torch.no_grad():
        pairs[0][0].add_(1)
    third = shared.base(run, task, *given)
    assert third is not None and not any(
        a.data_ptr() == c.data_ptr() for (a, _), c in zip(pairs, base_parameters(third).values(), strict=True)
    )


def test_another_start_is_measured_for_itself(tmp_path: Path):
    shared = Shared()
    one = shared.opening(of(tmp_path, "a", lr=1e-2))
    assert shared.opening(of(tmp_path, "b", lr=1e-3)) is one
    assert shared.opening(of(tmp_path, "b", seed=1)) is not one
    assert shared.opening(of(tmp_path, "b", options={"rank": 2})) is not one
