"""Every task trains, measures, resumes, streams, plans and reports, or says at the start that it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import heads, tiny
from support.resuming import resumes_bit_for_bit
from support.rows import CASES

from veneer import tasks
from veneer.analyse.page import figures
from veneer.errors import ConfigError
from veneer.runs.fit import fit
from veneer.runs.fit_many import fit_many
from veneer.runs.report import report
from veneer.tasks.base.abilities import Examined, Joint, Outlined
from veneer.train.run import Run
from veneer.verbs.eval.evaluate import evaluate
from veneer.verbs.plan import plan as planned
from veneer.verbs.plan.plan import plan

# Tasks of pictures and sound, which have tests of their own.
SENSES = {"speech-recognition", "image-classification", "text-to-image"}
each_task = pytest.mark.parametrize("task", CASES, scope="module")  # one task after another
ROWS = (64, 12, 8)  # of train, valid and known
FEW = {"code": (64, 4, 3)}  # where each measured row is a process
# The first task of each step by shapes: the others halve their settings alike.
HALVED = {tasks.get(t).outline.__module__: t for t in reversed(CASES) if issubclass(tasks.get(t), Outlined)}


def test_every_task_is_here_or_has_tests_of_its_own():
    assert {*tasks.available()} - SENSES == {*CASES}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for kind in ("bert", "lm", "t5", "masked"):
        heads.base(root / kind, kind)
    for task, (make, _) in CASES.items():
        (root / task).mkdir()
        heads.write(root / task, make, FEW.get(task, ROWS))
    return root


def settings(place: Path, task: str, out: Path, **changed: Any) -> dict[str, Any]:
    own = {"model": str(place / CASES[task][1]), **changed}
    return heads.settings(place / task, task, out, **own)


@pytest.fixture(scope="module")
def whole(place, task, tmp_path_factory) -> Path:
    """The folder of one uninterrupted training of the task, or of another when a worker comes back to it."""
    given = settings(place, task, tmp_path_factory.mktemp("whole") / "run", report=True)
    return fit(Run.from_dict(given), progress=False).folder


@each_task
def test_fits_and_is_measured_on_valid_and_known_text(whole, task):
    results = json.loads((whole / "results.json").read_text())
    metric = tasks.get(task).METRIC
    assert results["metric"] == metric._asdict()
    for part in ("valid", "known"):
        assert all(torch.isfinite(torch.tensor(results[when][part])) for when in ("before", "after"))
    losses = [line["loss"] for line in tiny.metrics(whole) if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert not metric.beats(results["before"]["valid"], results["after"]["valid"])


@each_task
def test_it_resumes_after_a_kill_bit_for_bit(place, whole, task, tmp_path, monkeypatch):
    given = settings(place, task, tmp_path / "run")
    resumes_bit_for_bit(given, whole, monkeypatch, 8)


@each_task
def test_it_streams(place, task, tmp_path):
    run = settings(place, task, tmp_path / "run", stream=True, buffer=8, steps=3, eval_every=3)
    result = fit(Run.from_dict(run), progress=False)
    assert result.metrics["steps"] == 3


@each_task
def test_eval_agrees_with_the_run(place, whole, task):
    data = str(place / task / "valid.jsonl")
    found = evaluate(
        str(place / CASES[task][1]),
        adapter=[f"own={whole}"],
        data=[data],
        task=task,
        length=64,
        progress=False,
    )
    results = json.loads((whole / "results.json").read_text())
    line = found.lines[0]
    assert line.metric == tasks.get(task).METRIC.words
    assert line.base == pytest.approx(results["before"]["valid"], rel=1e-4, abs=1e-6)
    assert line.adapters["own"].value == pytest.approx(results["after"]["valid"], rel=1e-3, abs=1e-6)


@each_task
def test_it_has_a_dial_a_report_and_a_card(whole, task):
    results = json.loads((whole / "results.json").read_text())
    name = tasks.get(task).METRIC.name
    assert results["dial"]["points"][0].keys() == {"strength", f"target_{name}", f"known_{name}"}
    assert ("examined" in results) == issubclass(tasks.get(task), Examined)
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert tasks.get(task).METRIC.words in page
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"pipeline_tag: {tasks.get(task).PIPELINE}" in card


@each_task
def test_it_is_reported_again_from_its_files(whole, task, monkeypatch):
    monkeypatch.setattr(figures, "keep", lambda figure, file: f"<svg>{file.stem}</svg>")  # drawn in training
    assert report(str(whole), measure=True, progress=False)["missing"] == []


@each_task
def test_plan_forecasts_it_or_says_that_it_cannot(place, task, tmp_path, monkeypatch):
    run = Run.from_dict(settings(place, task, tmp_path / "run"))
    if not issubclass(tasks.get(task), Outlined):
        with pytest.raises(
            ConfigError, match=f"needs a task that states its shapes, which '{task}' does not"
        ):
            plan(run, progress=False)
        return
    if task not in HALVED.values():
        monkeypatch.setattr(planned, "halving", lambda *given: [])
    found = plan(run, probe=False, progress=False)
    assert bool(found.halving) == (task in HALVED.values())
    assert found.memory.peak > found.memory.weights and found.flops.total > 0


@each_task
def test_several_train_together_or_are_refused(place, task, tmp_path):
    runs = [
        Run.from_dict(
            settings(place, task, tmp_path / name, options={"rank": 4}, lr=lr, steps=3, accumulate=1)
        )
        for name, lr in (("a", 1e-2), ("b", 2e-2))
    ]
    if not issubclass(tasks.get(task), Joint):
        with pytest.raises(ConfigError, match=f"task '{task}' has no joint training; train its runs alone"):
            fit_many(runs, progress=False)
    else:
        assert [r.metrics["steps"] for r in fit_many(runs, progress=False)] == [3, 3]


def test_hidden_tokens_are_drawn_anew_so_frozen_blocks_cannot_be_cached(place, tmp_path):
    run = settings(place, "masked-lm", tmp_path / "run", cache_frozen=True, to=r".*layer\.1\..*dense")
    with pytest.raises(ConfigError, match="cache_frozen needs a task whose model sees an example alike"):
        fit(Run.from_dict(run), progress=False)
