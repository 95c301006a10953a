"""The journal keeps every trial over processes, kills and a full disk."""

from __future__ import annotations

import optuna
import pytest

from veneer.search.compare.journal import FILE, Journal
from veneer.search.decide.trial import DIVERGED, FINISHED, GOING, Point, Progress, Trial
from veneer.tasks import Metric
from veneer.train.errors import NotSaved

METRIC = Metric("bpb", "bits per byte")
A, B = Trial("lora", 1e-3), Trial("dora", 2e-3, 1)
HALF = Progress(0.5, GOING, (Point(0, 2.0, 0.0), Point(4, 1.5, 0.25)))
WHOLE = Progress(1.0, FINISHED, (*HALF.points, Point(8, 1.25, 0.5)))


def test_progress_is_read_by_another_process(tmp_path):
    one, other = Journal(tmp_path, METRIC), Journal(tmp_path, METRIC)
    assert other.read() == {} and one.noted("bank") is None
    one.put(A, HALF)
    other.put(B, WHOLE)
    other.note("bank", 0.5)
    assert one.read() == other.read() == {A.key: HALF, B.key: WHOLE}
    one.put(A, WHOLE)
    assert Journal(tmp_path, METRIC).read() == {A.key: WHOLE, B.key: WHOLE} and one.noted("bank") == 0.5


def test_optunas_tools_see_trials_with_their_states(tmp_path):
    journal = Journal(tmp_path, METRIC)
    journal.put(A, HALF)
    journal.drop(A, 0.5, "place 4 of 5")
    journal.put(B, WHOLE)
    journal.put(Trial("oft", 0.5), Progress(0.25, DIVERGED, (), "its loss rose"))
    found = {t.params["method"]: t for t in journal.study.trials}
    states = optuna.trial.TrialState
    assert [found[m].state for m in ("lora", "dora", "oft")] == [states.PRUNED, states.COMPLETE, states.FAIL]
    assert found["lora"].intermediate_values == {0: 2.0, 4: 1.5} and found["dora"].value == 1.25
    assert found["dora"].params == {"method": "dora", "lr": 2e-3, "seed": 1}
    assert journal.study.best_trial.number == found["dora"].number
    assert (
        journal.ends() == {A.key: "place 4 of 5"} and journal.read()["oft-0.5-s0"].reason == "its loss rose"
    )


def test_a_second_process_may_drop_what_the_first_has_dropped(tmp_path):
    one, other = Journal(tmp_path, METRIC), Journal(tmp_path, METRIC)
    one.put(A, HALF)
    one.drop(A, 0.5, "place 4 of 5")
    other.drop(A, 0.5, "place 4 of 5")
    assert other.ends() == {A.key: "place 4 of 5"}


def test_both_may_drop_a_trial_at_once(tmp_path, monkeypatch):
    one, other = Journal(tmp_path, METRIC), Journal(tmp_path, METRIC)
    one.put(A, HALF)
    before = other._trials()
    one.drop(A, 0.5, "place 4 of 5")
    monkeypatch.setattr(other, "_trials", lambda: before)  # as read a moment earlier
    other.drop(A, 0.5, "place 4 of 5")
    assert one.ends() == {A.key: "place 4 of 5"}


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    journal = Journal(tmp_path, METRIC)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NotSaved, match=r"journal.log could not be written: .*No space left.*give the same"):
        journal.put(A, HALF)
    assert journal.file == tmp_path / FILE
