"""Comparisons and bounds with known answers: planted forgetting, kills, processes, texts that do not fit."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import tiny
from support.resuming import Killed, killed_at

import veneer
from veneer.errors import VeneerError
from veneer.files import read_json
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.search.budget.within import fit_within
from veneer.search.compare import compare as comparing
from veneer.search.compare import training
from veneer.search.compare.compare import compare
from veneer.search.compare.settings import Comparison
from veneer.train.errors import NotSaved
from veneer.train.folder import layout
from veneer.train.run import Run

SHARED = ("lr", "eval_every", "save_every", "out", "report")
NEW = "zoo fix jam owl quiz hex vow yak gym fjord wax box kiwi lynx".split()


def settings(folder, **changed):
    own = {"options": {"rank": 2}, "steps": 8, "accumulate": 1, "eval_windows": 2, "compile": "off"}
    given = tiny.settings(folder, **{**own, "test": str(folder / "valid.txt"), **changed})
    return {k: v for k, v in given.items() if k not in SHARED}


def small(folder, **changed):
    own = {"methods": ("lora",), "seeds": 2, "durations": (0.5, 0.25), "together": 1}
    own |= {"centre": {"lora": 0.02}, "out": str(folder / "compared")}
    return Comparison(**{**own, **changed})


def table(found):
    """Returns what a table says, without times."""
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in found["methods"]]
    for row in rows:
        row["tried"] = [{k: v for k, v in t.items() if "second" not in k} for t in row["tried"]]
    return json.loads(json.dumps([rows, found["verdicts"], found["best"]]), parse_float=lambda s: float(s))


@pytest.fixture(scope="module")
def knowing(tmp_path_factory) -> Path:
    """A folder with a base that has learned its known text, and texts of other words."""
    folder = tmp_path_factory.mktemp("knowing")
    own = {"method": "full", "options": {}, "steps": 60, "eval_every": 60, "lr": 5e-3, "accumulate": 1}
    given = tiny.settings(folder, **own, data=str(folder / "train.txt"), report=False)
    result = fit(Run.from_dict({**given, "out": str(folder / "pretrained")}), progress=False)
    base = pretrained.causal_lm(given["model"], torch.float32, torch.device("cpu"))
    veneer.load(base, result.adapter, name="learned")
    veneer.merge(base)
    base.save_pretrained(folder / "base")
    for part, seed, words in (("new", 5, 1500), ("new-valid", 6, 300), ("new-test", 7, 300)):
        text = tiny.text(seed, words)
        for old, new in zip(dict.fromkeys(tiny.WORDS), NEW, strict=False):
            text = text.replace(f"{old} ", f"{new} ")
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")
    (folder / "known.txt").write_text(tiny.text(3, 1500), encoding="utf-8")
    return folder


def of_new_words(folder, **changed):
    texts = {"data": "new", "valid": "new-valid", "test": "new-test", "known": "known"}
    return settings(folder, **{k: str(folder / f"{v}.txt") for k, v in texts.items()}, **changed)


def test_planted_forgetting_is_seen(knowing, tmp_path):
    """Known text is what the base was trained on; new text replaces its words."""
    found = compare(Run.from_dict(of_new_words(knowing, steps=16)), small(tmp_path), progress=False)
    (row,) = found["methods"]
    assert row["forgotten"]["mean"] > 0.1
    points = sorted(row["front"][-1]["points"], key=lambda p: p["strength"])
    assert points[0]["known_bpb"] < points[-1]["known_bpb"] - 0.1


def test_a_comparison_killed_within_a_training_goes_on_to_the_same_table(tmp_path, monkeypatch):
    run = Run.from_dict(settings(tmp_path))
    whole = compare(run, small(tmp_path, out=str(tmp_path / "whole")), progress=False)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 3)  # of the first trial that comes so far
        compare(run, small(tmp_path), progress=False)
    assert table(compare(run, small(tmp_path), progress=False)) == table(whole)


# -- with trainings that take no time ------------------------------------------------------------------------


def trained(run, step, shared=None):
    """Writes the files of a training to `step` at once, and a line into the log of all processes."""
    out = Path(run.out)
    with os.fdopen(
        os.open(out.parents[1].parent / "log", os.O_APPEND | os.O_CREAT | os.O_WRONLY), "w"
    ) as log:
        log.write(f"{out.name} {step}\n")
    out.mkdir(parents=True, exist_ok=True)
    end = 1 + abs(run.lr - 0.02) + run.seed / 100
    at = [s for s in range(step + 1) if s % run.eval_every == 0 or s == step]
    lines = [{"step": s, "valid_bpb": end + 1 - s / run.steps, "seconds": s / 10} for s in at]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if step == run.steps:
        pair = {"before": end + 1, "after": end, "text": "test"}
        ends = {"before": {"valid": end + 1, "test": end + 1}, "after": {"valid": end, "test": end}}
        sizes = {"trainable_parameters": 10, "adapter_bytes": 40, "steps": step}
        forgotten = {"before": 1.0, "after": 1.1}
        layout.put(out / "results.json", {**ends, "learned": pair, "forgotten": forgotten, **sizes})


@pytest.fixture
def quick(monkeypatch):
    dial = {"recommended": 1.0, "points": [{"strength": 1.0, "target_bpb": 1.0, "known_bpb": 1.1}]}
    monkeypatch.setattr(training, "WAIT", 0.05)
    monkeypatch.setattr(training, "fit_until", trained)
    judge = type("J", (), {"__init__": lambda *a: None, "dial": lambda self, t: dial})
    monkeypatch.setattr(comparing, "Judge", judge)


def logged(folder):
    return Counter((folder / "log").read_text().splitlines())


def test_two_processes_on_one_journal_repeat_no_work(tmp_path, quick):
    run, context = Run.from_dict(settings(tmp_path)), multiprocessing.get_context("fork")
    workers = [
        context.Process(target=compare, args=(run, small(tmp_path)), kwargs={"progress": False})
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert max(logged(tmp_path).values()) == 1
    (tmp_path / "alone").mkdir()
    alone = compare(run, small(tmp_path / "alone"), progress=False)
    assert table(read_json(tmp_path / "compared" / "results.json")) == table(alone)
    assert logged(tmp_path) == logged(tmp_path / "alone")


def test_a_full_disk_ends_the_comparison_and_the_same_command_goes_on(tmp_path, quick, monkeypatch):
    run = Run.from_dict(settings(tmp_path))
    (tmp_path / "whole").mkdir()
    whole = compare(run, small(tmp_path / "whole"), progress=False)
    for n in (1, 4, 9):
        left, put = [n], training.Journal.put

        def full(journal, trial, progress, left=left, put=put):
            left[0] -= 1
            if not left[0]:
                raise NotSaved("journal.log could not be written: No space left on device")
            put(journal, trial, progress)

        with monkeypatch.context() as patch, pytest.raises(NotSaved, match="No space left"):
            patch.setattr(training.Journal, "put", full)
            compare(run, small(tmp_path), progress=False)
    assert table(compare(run, small(tmp_path), progress=False)) == table(whole)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_texts_that_the_metric_cannot_measure_are_refused_before_any_training(tmp_path, quick, part):
    rows = tiny.jsonl(tmp_path / "rows.jsonl", {"prompt": "the cat", "completion": ""})
    with pytest.raises(VeneerError) as e:
        compare(Run.from_dict(settings(tmp_path, **{part: str(rows)})), small(tmp_path), progress=False)
    assert str(rows) in str(e.value) or part in str(e.value)
    assert not (tmp_path / "log").exists()


# -- the forgetting bound ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bound_holds_on_test_text_in_19_of_20_runs(knowing, tmp_path):
    held, chosen = bounded(knowing, tmp_path, 20)
    assert held >= 19 and chosen >= 15


def bounded(knowing, out, runs):
    """Returns how many runs kept the bound on test text, and how many learned within it."""
    held = chosen = 0
    for seed in range(runs):
        given = of_new_words(knowing, steps=6, seed=seed, eval_windows=40)
        run = Run.from_dict({**given, "lr": 0.02, "eval_every": 6, "out": str(out / f"{seed}")})
        found = fit_within(run, 0.02, progress=False)
        held += found["chosen"] is None or found["chosen"]["held"]
        chosen += found["chosen"] is not None
    return held, chosen
