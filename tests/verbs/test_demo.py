"""The demo: its numbers, what it promises about learning, a second run, and the strength it recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.cli.frame import main
from veneer.data.spread import spread
from veneer.embedded import names
from veneer.embedded.texts import DOMAINS, has
from veneer.errors import ConfigError, option
from veneer.runs.dial import Point, recommend
from veneer.tasks.text.bits import BITS
from veneer.train.errors import Interrupted
from veneer.verbs.demo import answered, contenders, judge, questions, training
from veneer.verbs.demo import demo as module
from veneer.verbs.demo.contenders import CONTENDERS, settings
from veneer.verbs.demo.demo import demo, text
from veneer.verbs.demo.judge import Judge

TARGETS = [d for d in DOMAINS if has(d)]
LEAST = {"prose": 0.10, "c": 0.15}  # what LoRA must learn, as a share of the base's bits per byte
ENOUGH = {"prose": 100, "c": 60}  # steps that reach it; the demo makes 100


@pytest.fixture(scope="module")
def judging():
    """One judge for the trainings of full size: each text is read, and the base measured, once."""
    return Judge(seed=0)


@pytest.mark.parametrize(
    ("target", "steps"),
    [(t, ENOUGH[t]) for t in TARGETS]
    + [pytest.param(t, 100, marks=pytest.mark.slow) for t in TARGETS if ENOUGH[t] < 100],
)
def test_lora_learns_what_the_demo_promises(target, steps, judging, tmp_path, monkeypatch):
    """The demo's own setting, its whole length or less, judged on test text that nothing was chosen by."""
    from veneer.runs.fit import fit

    monkeypatch.setattr(judge, "DIALLED", {"valid": [0.5, 1.0], "test": [1.0]})
    run = settings(tmp_path, target, "lora", CONTENDERS["lora"], steps=steps, seed=0)
    row = judging.row(target, "lora", fit(run, progress=False))
    assert row["target_bpb_after"] <= (1 - LEAST[target]) * row["target_bpb_before"]
    assert row["known_bpb_after"] > row["known_bpb_before"]  # it does forget, and says so
    assert row["samples"]["before"] != row["samples"]["after"]
    assert row["recommended_strength"] in (0.5, 1.0)


def test_answers_become_right_and_little_is_forgotten(judging, tmp_path, monkeypatch):
    """The second act's own setting at two fifths of its length, on names that stand in no training row."""
    from veneer.runs.fit import fit

    monkeypatch.setattr(questions, "ASKED", 60)
    monkeypatch.setattr(questions, "STRENGTHS", (0.0, 0.5, 1.0))
    result = fit(questions.settings(tmp_path, steps=40, seed=0), progress=False)
    found = questions.row(judging, result)
    base, half, full = found["dial"]
    assert base["right"] == found["right_before"] == 0 and full["right"] == found["right_after"] >= 12
    assert base["right"] <= half["right"] <= full["right"]
    assert base["known_bpb"] < full["known_bpb"] < 1.2 * base["known_bpb"]
    right = [row["after"] == row["truth"] for row in found["rows"]]
    assert (len(right), sum(right)) == (60, found["right_after"])
    shown = answered.text(found)
    assert f"right answers: 0 of 60 before, {found['right_after']} of 60 after 100 steps of LoRA" in shown
    assert "(right)" in shown and max(map(len, shown.splitlines())) <= 140


def test_a_stopped_demo_goes_on_by_the_same_command(tmp_path, short, monkeypatch):
    def stopped(run, progress, shared):
        raise Interrupted(f"stopped; saved in {run.out}: resume with {option('resume', True)}", 2)

    monkeypatch.setattr(training, "fit", stopped)
    with pytest.raises(Interrupted) as e:
        demo(str(tmp_path), steps=2, progress=False)
    assert str(e.value).endswith(": resume with the same command") and e.value.exit_code == 130


@pytest.fixture
def short(monkeypatch):
    """Few windows, strengths and questions: what is written matters, not the figures."""
    for module_, name, value in (
        (judge, "WINDOWS", 2),
        (contenders, "WINDOWS", 4),  # of which a fourth, one, is measured while training
        (judge, "DIALLED", {"valid": [0.5, 1.0], "test": [0.5, 1.0]}),
        (questions, "ASKED", 8),
        (questions, "STRENGTHS", (0.0, 1.0)),
        (questions, "LONGER", 1),
    ):
        monkeypatch.setattr(module_, name, value)


def test_without_c_headers_the_demo_writes_what_it_says_and_a_second_run_repeats_nothing(
    tmp_path, short, monkeypatch, capsys
):
    monkeypatch.setattr(module, "has", lambda name: name == "prose")
    out = tmp_path / "demo"
    results = demo(str(out), steps=2)
    said = "text for 'C headers' is missing in this interpreter; the demo leaves it out"
    assert said in capsys.readouterr().err
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert [(r["target"], r["method"]) for r in stored["methods"]] == [
        ("prose", m) for m in ("full", "lora", "loraplus")
    ]
    for r in stored["methods"]:
        for key in (
            "target_bpb_before",
            "target_bpb_after",
            "known_bpb_before",
            "known_bpb_after",
            "seconds",
        ):
            assert isinstance(r[key], float) and r[key] > 0
        assert r["trainable_parameters"] == (4_262_144 if r["method"] == "full" else 157_696)
        assert r["adapter_bytes"] > 4 * r["trainable_parameters"]
    assert (out / "learning-vs-forgetting.png").read_bytes().startswith(b"\x89PNG")
    shown = text(results)
    answers = stored["answers"]
    assert [row["prompt"] for row in answers["rows"]] == [
        row["prompt"] for row in spread(names.pairs("test"), 8)
    ]
    assert [p["strength"] for p in answers["dial"]] == [0, 1] and answers["asked"] == 8
    card = (out / "names" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "On test text: 0.000 share of right answers" in card and "builtin:names:test" in card
    card = (out / "prose-lora" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| test | builtin:prose |" in card and "On test text:" in card
    for words in (
        "right answers: 0 of 8 before",
        "full fine-tuning",
        "LoRA+",
        "are noise at one seed",
        "Next: veneer generate --adapter",
    ):
        assert words in shown
    logs = {f: f.read_bytes() for f in out.glob("*/metrics.jsonl")}
    again = demo(str(out), steps=2, progress=False)
    assert {f: f.read_bytes() for f in out.glob("*/metrics.jsonl")} == logs and len(logs) == 4
    assert [r["target_bpb_after"] for r in again["methods"]] == [
        r["target_bpb_after"] for r in results["methods"]
    ]
    with pytest.raises(ConfigError) as e:
        demo(str(out), steps=3, progress=False)
    said = "put them back, begin anew in another folder\nor remove an earlier demo's files by fresh=True"
    assert "steps: 2 -> 3" in str(e.value) and str(e.value).endswith(said)
    (out / "thesis.txt").write_text("mine")
    capsys.readouterr()
    assert main(["demo", "--out", str(out), "--steps", "0", "--fresh"]) == 2  # before anything is removed
    assert (
        capsys.readouterr().err == "error: --steps must be 1 or more, got 0\n"
        and (out / "results.json").is_file()
    )
    module._clear(out)
    assert [p.name for p in out.iterdir() if p.suffix != ".png"] == ["thesis.txt"]


def test_the_rates_are_those_of_the_committed_sweep():
    sweep = json.loads((Path(__file__).parents[2] / "bench/results/demo_rates.json").read_text())["figures"]
    for label, contender in CONTENDERS.items():
        for target, rate in contender.rates.items():
            assert rate == sweep[f"{target}_{label}_rate"]


def test_the_recommended_strength_keeps_most_of_the_learning_and_forgets_least():
    points = [
        Point(0, 2.0, 1.0),
        Point(0.5, 1.6, 1.1),
        Point(0.75, 1.52, 1.2),
        Point(1, 1.5, 1.4),
        Point(1.25, 1.55, 1.8),
    ]
    assert recommend(points, BITS) == 0.75  # 96 % of the learning at half the forgetting
    assert recommend([Point(0, 2.0, 1.0), Point(1, 1.0, 1.5), Point(1.25, 0.5, 2.0)], BITS) == 1.25
    assert recommend([Point(0, 2.0, 1.0), Point(1, 2.1, 1.5)], BITS) == 1.0
