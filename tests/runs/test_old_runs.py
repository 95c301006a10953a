"""Runs and adapters written by earlier versions still resume, load and report."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny

import veneer
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.train.folder import drift
from veneer.train.folder.result import Result
from veneer.train.run import Run

OLD = Path(__file__).parent.parent / "golden" / "runs"
RUNS = ("lora", "dora-pissa", "full", "prefix-stream")
# Other processors add in another order. Eight steps of a small training make less than this of one rounding.
NEAR = torch.finfo(torch.float32).eps ** 0.5


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A copy of the old runs as the current folder, as their paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def assert_near(now: Any, then: Any, where: str = "") -> None:
    """Every key and every text is that of then, every float nearly."""
    if isinstance(then, dict):
        assert now.keys() >= then.keys(), (where, then.keys() - now.keys())
        for key in then:
            assert_near(now[key], then[key], f"{where}.{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for i, (a, b) in enumerate(zip(now, then, strict=True)):
            assert_near(a, b, f"{where}[{i}]")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=NEAR, abs=NEAR), where
    else:
        assert now == then, where


@pytest.mark.parametrize("name", RUNS)
def test_an_old_half_run_goes_on_as_it_would_have_then(place, name):
    half, whole = place / name / "half", place / name / "whole"
    run = Run.from_dict({**read(half / "config.json")["run"], "resume": True, "report": False})
    result = fit(run, progress=False)
    assert_near(tiny.metrics(half), tiny.metrics(whole))
    measured = ("before", "after", "learned", "forgotten", "steps", "best_step", "tokens", "padding_share")
    then, now = read(whole / "results.json"), read(half / "results.json")
    assert_near({k: now[k] for k in measured}, {k: then[k] for k in measured})
    (old,), (new,) = (sorted((f / "adapter").glob("*.safetensors")) for f in (whole, half))
    assert old.name == new.name
    before, after = load_file(old), load_file(new)
    assert before.keys() == after.keys()
    for key, t in before.items():
        assert float((after[key] - t).norm()) <= NEAR * float(t.norm()), key
    assert result.learned.after == pytest.approx(then["learned"]["after"], rel=NEAR)


@pytest.mark.parametrize("name", RUNS)
def test_settings_of_an_old_run_are_read_and_written_alike(place, name):
    then = read(place / name / "half" / "config.json")["run"]
    run = Run.from_dict(drift.record(place / name / "half")["run"])
    now = json.loads(json.dumps(asdict(run), default=list))
    assert {k: now[k] for k in then} == then
    assert asdict(Run.from_dict(now)) == asdict(run)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_adapter_loads_and_predicts_what_its_run_measured(place, name):
    """Its strength 1 lowers the loss on the text that it learned."""
    model = pretrained.causal_lm("base", torch.float32, torch.device("cpu"))
    ids = tiny.tokenizer()((place / "valid.txt").read_text(), return_tensors="pt")["input_ids"][:, :64]
    with torch.no_grad():
        before = float(model(input_ids=ids, labels=ids).loss)
        veneer.load(model, place / name / "whole" / "adapter")
        after = float(model(input_ids=ids, labels=ids).loss)
    assert after < before


@pytest.mark.parametrize("name", RUNS)
def test_an_old_result_is_read_and_reported(place, name):
    whole = place / name / "whole"
    result, then = Result.read(whole), read(whole / "results.json")
    assert (result.learned.before, result.learned.after) == (
        then["learned"]["before"],
        then["learned"]["after"],
    )
    assert report(str(whole), progress=False)["missing"] == []
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert f"{then['learned']['after']:.3f}" in page and "bits per byte" in page
    assert ("Strength of the adapter" in page) and ("dial" in then) == ("Recommended strength" in page)


def test_an_old_finished_run_is_returned_as_it_is(place):
    given = {**read(place / "lora" / "whole" / "config.json")["run"], "resume": True}
    assert fit(Run.from_dict(given), progress=False).metrics == read(
        place / "lora" / "whole" / "results.json"
    )
