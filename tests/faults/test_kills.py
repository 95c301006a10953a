"""Killed before any change to its folder, or within a write, a training resumes to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import tally, tiny
from support.dying import Dead, Watch, watching
from support.resuming import assert_same

from veneer.runs.fit import fit
from veneer.train.run import Run

SHORT = {"steps": 4, "eval_every": 2, "save_every": 3}
LOFTQ = {"quantise": "nf4", "options": {"rank": 4, "init": "loftq"}}  # a base of its own, before config.json
TRP = {"method": "full", "options": {}, "trp": 0.8, "trp_every": 1}  # a compressed model at the end
# By case: settings, the change at which points of a kill begin, and their number in short and in full.
CASES: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "beginning and end": ({}, "", 8, 1000),
    "beginning with a base": (LOFTQ, "", 3, 40),
    "end with a compressed model": (TRP, "compressed", 2, 30),
    "end with a report": ({"report": True}, "results.json", 1, 8),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kills")


def train(given: dict[str, Any], out: Path, **changed: Any) -> None:
    fit(Run.from_dict({**given, "out": str(out), **changed}), progress=False)


def names(out: Path) -> list[str]:
    """Names of all files of the run; which checkpoints are kept depends on the evaluations since."""
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if "checkpoints" not in p.parts)


def points(events: list[str], after: str) -> list[tuple[int, bool]]:
    """Returns (change, torn) for all changes after the first that names `after`."""
    first = next(i for i, event in enumerate(events, 1) if after in event)
    found = [(i, event) for i, event in enumerate(events, 1) if i > first]
    return [(i, False) for i, _ in found] + [(i, True) for i, event in found if event.startswith("open ")]


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_change_of_its_folder_a_run_resumes(place, tmp_path, case):
    changed, after, *n = CASES[case]
    given = tiny.settings(place, **SHORT, **changed)
    whole, out = tmp_path / "whole", tmp_path / "run"
    with watching(Watch(whole)) as seen:
        train(given, whole)
    there = points(seen.events, after)
    assert len(there) > 40
    for at, torn in tally.sample(there, *n):
        shutil.rmtree(out, ignore_errors=True)
        with pytest.raises(Dead), watching(Watch(out, at, torn=torn)):
            train(given, out)
        with tally.one("kills"):
            train(given, out, resume=True)
            assert_same({"out": str(out)}, whole)
            assert names(out) == names(whole), seen.events[at - 1]


def test_killed_at_any_change_of_its_beginning_a_run_begins_again(place, tmp_path):
    """Without resume: a folder with nothing but its own leftovers is free."""
    given, out = tiny.settings(place, **SHORT), tmp_path / "run"
    with pytest.raises(Dead), watching(Watch(out, 1 << 20)) as seen:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("veneer.runs.fit.loop_of", dead)
            train(given, out)
    last = next(i for i, event in enumerate(seen.events, 1) if event.startswith("os.rename"))
    for at in tally.sample(range(1, last + 1), 5):
        shutil.rmtree(out)
        with pytest.raises(Dead), watching(Watch(out, at, torn=True)):
            train(given, out)
        with pytest.MonkeyPatch.context() as patch, tally.one("kills"):
            patch.setattr("veneer.runs.fit.loop_of", dead)
            with pytest.raises(Dead):
                train(given, out)
            assert names(out) == ["config.json", "lock"]


def dead(*given: Any) -> Any:
    raise Dead
