"""A training in parts, alone or beside others, is the training in one go."""

from __future__ import annotations

import pytest
from support import tiny
from support.resuming import assert_same

from veneer.runs.fit import fit, fit_until
from veneer.runs.fit_many import fit_many_until
from veneer.train.folder.result import Result
from veneer.train.loop.state import Position
from veneer.train.run import Run


def given(folder, name, **changed):
    return tiny.settings(folder, out=str(folder / name), resume=True, compile="off", **changed)


def test_a_training_paused_twice_is_the_training_in_one_go(tmp_path):
    whole = fit(Run.from_dict(given(tmp_path, "whole")), progress=False).folder
    parts = given(tmp_path, "parts")
    found = [fit_until(Run.from_dict(parts), step) for step in (3, 8, 14)]
    assert [type(f) for f in found] == [Position, Position, Result] and found[0].step == 3
    assert_same(parts, whole)
    assert isinstance(fit_until(Run.from_dict(parts), 3), Result)  # finished: returned unchanged


def test_trainings_side_by_side_pause_together(tmp_path):
    runs = [
        Run.from_dict(given(tmp_path, name, options={"rank": 2}, lr=lr))
        for name, lr in (("a", 1e-2), ("b", 3e-3))
    ]
    assert [p.step for p in fit_many_until(runs, 4)] == [4, 4]
    first = fit_until(runs[0], 14)
    (second,) = fit_many_until(runs[1:], None)
    for name, found, lr in (("one", first, 1e-2), ("two", second, 3e-3)):
        alone = fit(Run.from_dict(given(tmp_path, name, options={"rank": 2}, lr=lr)), progress=False)
        assert found.learned.after == pytest.approx(alone.learned.after, rel=1e-4)


def test_patience_ends_a_training_before_its_pause(tmp_path):
    run = Run.from_dict(given(tmp_path, "a", lr=50.0, patience=1, eval_every=2, save_every=2))
    found = fit_until(run, 12)
    assert isinstance(found, Result) and found.metrics["steps"] < 12
