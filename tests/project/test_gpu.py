"""`make gpu` without a GPU: every part runs on a processor at tiny sizes, and results are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from gpu import __main__ as command  # noqa: E402
from gpu import agreement, ways  # noqa: E402
from gpu.parts import PARTS, TOTAL, Part  # noqa: E402

SAME = {"steps_h4096"}  # as steps_h2048 at tiny sizes
HERE_ALONE = {"graphs": "needs a GPU"}  # skipped, with a reason


def test_without_a_card_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(command, "_has_card", lambda: False)
    assert command.main([]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not command.OUT.exists()


def test_the_limits_fit_into_the_whole():
    assert TOTAL <= 480 and all(part.seconds <= TOTAL / 3 for part in PARTS.values())
    assert sum(part.seconds for part in list(PARTS.values())[:-1]) <= 1.2 * TOTAL  # most end long before


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SAME else n for n in PARTS if n not in HERE_ALONE],
)
def test_a_part_runs_on_a_processor(name):
    if name == "one_pass":
        pytest.importorskip("triton")
    part = PARTS[name]
    figures = part.function()("cpu", tiny=True, **part.arguments)
    assert figures.pop("problems", []) == []
    assert figures and all(isinstance(v, float) for v in figures.values())


def test_only_a_part_of_another_size_is_left_out():
    assert {PARTS[n].home for n in SAME} == {PARTS["steps_h2048"].home}


@pytest.mark.parametrize("name", HERE_ALONE)
def test_a_part_that_cannot_run_here_is_skipped_with_the_reason(name, capsys):
    assert command.child(name, "cpu", tiny=True) == 0
    found = json.loads(capsys.readouterr().out.removeprefix(command.MARK))
    assert found["outcome"] == "skipped" and HERE_ALONE[name] in found["text"]


def test_results_are_kept_after_every_part(tmp_path, monkeypatch):
    answers = iter(
        [
            {"outcome": "done", "figures": {"x": 1.0}, "seconds": 1.0},
            {"outcome": "timeout", "text": "over 1 s", "seconds": 1.0},
        ]
    )
    seen = []

    def one(name, device, *, tiny, seconds):
        seen.append(json.loads((tmp_path / "a.json").read_text()) if (tmp_path / "a.json").exists() else None)
        return next(answers)

    monkeypatch.setattr(command, "run_part", one)
    given = {"tiny": True, "seconds": 60.0, "out": tmp_path / "a.json"}
    line = command.round_of(["loss", "bank"], "cpu", **given)
    assert seen[0] is None and seen[1]["figures"] == {"x": 1.0}
    assert line == json.loads((tmp_path / "a.json").read_text())
    assert line["parts"]["bank"]["outcome"] == "timeout" and line["device"] == "cpu"


def test_a_part_runs_in_a_process_under_its_limit():
    found = command.run_part("loss", "cpu", tiny=True, seconds=120)
    assert found["outcome"] == "done" and found["figures"]["chunked_loss_off"] < 1e-5
    assert command.run_part("loss", "cpu", tiny=True, seconds=1.5)["outcome"] == "timeout"
    assert command.run_part("loss", "cpu", tiny=True, seconds=0.5)["text"] == "no time was left"


def test_failures_are_counted_and_named(monkeypatch, capsys):
    def broken(device, *, tiny):
        raise RuntimeError("the card is on fire")

    monkeypatch.setitem(PARTS, "loss", Part("gpu.ways:chunked_loss", 15))
    monkeypatch.setattr(ways, "chunked_loss", broken)
    command.child("loss", "cpu", tiny=True)
    line = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(line.removeprefix(command.MARK))
    assert found == {"outcome": "failed", "text": "RuntimeError: the card is on fire"}
    problems = agreement._counted("things", ["a", "b"], lambda n, d: "wrong" if n == "b" else None, "cpu")
    assert problems == {"things": 2.0, "things_right": 1.0, "problems": ["b: wrong"]}
