"""A task of one file trains, resumes after a kill, evaluates and gets a report; nothing else knows of it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import heads, tiny
from support.resuming import Killed, assert_same, killed_at

from veneer import tasks
from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.runs.fit_many import fit_many
from veneer.runs.report import report
from veneer.train.run import Run
from veneer.verbs.data.check import check
from veneer.verbs.eval.evaluate import evaluate
from veneer.verbs.plan.plan import plan

TOY = Path(__file__).parent / "toy"
NAME = "toy-regression"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Registration: the folder of the file beside the package's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "__path__", [*tasks.__path__, str(TOY)])
        importlib.invalidate_caches()
        yield
        sys.modules.pop("veneer.tasks.toy_regression", None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny base with one output, and texts rated by their cats."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    root = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny.tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=1,
        pad_token_id=tiny.tokenizer().pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(root / "base")
    tiny.tokenizer().save_pretrained(root / "base")
    for part, seed, n in (("train", 1, 60), ("valid", 2, 20), ("known", 3, 20)):
        tiny.jsonl(root / f"{part}.jsonl", *(rated(100 * seed + i) for i in range(n)))
    return root


def rated(seed: int) -> dict[str, Any]:
    text = tiny.text(seed, 4 + seed % 9)
    return {"text": text, "score": text.count("cat") + 0.5 * text.count("dogs")}


def settings(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    own = heads.settings(place, NAME, out)
    del own["length"]  # the toy has no windows
    return {**own, **changed}


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(settings(place, place / "whole")), progress=False)
    return place / "whole"


def test_the_file_is_short():
    assert len((TOY / "toy_regression.py").read_text().splitlines()) <= 60


def test_it_learns_and_is_measured_in_its_own_metric(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["metric"] == {"name": "mse", "unit": "mean squared error", "lower_is_better": True}
    assert results["after"]["valid"] < 0.8 * results["before"]["valid"]
    lines = tiny.metrics(whole)
    assert [line["step"] for line in lines if "valid_mse" in line] == [0, 4, 8, 12, 14]
    facts = json.loads((whole / "config.json").read_text())["data"]["train"]
    assert (facts["rows"], facts["examples"], facts["labels"]) == (60, 60, 60)


@pytest.mark.parametrize("changed", [{}, {"stream": True, "buffer": 8}])
def test_it_resumes_after_a_kill_bit_for_bit(place, tmp_path, monkeypatch, changed):
    given = settings(place, tmp_path / "run", **changed)
    reference = tmp_path / "reference"
    fit(Run.from_dict({**given, "out": str(reference)}), progress=False)
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        with pytest.raises(Killed):
            fit(Run.from_dict(given), progress=False)
    assert not (tmp_path / "run" / "results.json").exists()
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    assert_same(given, reference)


def test_it_gets_a_report_and_a_card(whole):
    assert report(str(whole), measure=True, progress=False)["missing"] == []
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "mean squared error" in page and "Mean squared error at every strength" in page
    assert "bits per byte" not in page and "window" not in page.replace("eval_windows", "")
    dial = json.loads((whole / "results.json").read_text())["dial"]
    assert dial["points"][0].keys() == {"strength", "target_mse", "known_mse"}
    card = (whole / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card


def test_eval_agrees_with_the_run_and_has_an_interval(place, whole):
    results = json.loads((whole / "results.json").read_text())
    found = evaluate(
        str(place / "base"),
        adapter=[f"own={whole}"],
        data=[str(place / "valid.jsonl")],
        task=NAME,
        progress=False,
    )
    (line,) = found.lines
    assert (line.metric, line.n, line.units) == ("mean squared error", 20, "documents")
    assert line.base == pytest.approx(results["before"]["valid"], rel=1e-5)
    own = line.adapters["own"]
    assert own.value == pytest.approx(results["after"]["valid"], rel=1e-4)
    assert own.low is not None and own.low <= own.difference <= own.high


def test_hidden_states_below_the_first_adapted_block_can_be_cached(place, tmp_path):
    own = {"to": r".*layers\.1\..*", "options": {"rank": 4}}
    cached, plain = (
        fit(Run.from_dict(settings(place, tmp_path / str(on), cache_frozen=on, **own)), progress=False)
        for on in (True, False)
    )
    assert cached.learned.after == pytest.approx(plain.learned.after, rel=1e-4)


def test_it_says_at_the_door_what_it_cannot(place, tmp_path):
    given = settings(place, tmp_path / "run")
    with pytest.raises(
        ConfigError, match=f"plan needs a task that states its shapes, which '{NAME}' does not"
    ):
        plan(Run.from_dict(given), progress=False)
    with pytest.raises(ConfigError, match=f"task '{NAME}' has no joint training; train its runs alone"):
        fit_many([Run.from_dict(given), Run.from_dict({**given, "out": str(tmp_path / "b")})])
    with pytest.raises(ConfigError, match=f"data of task '{NAME}' cannot be shown or checked"):
        check(Run.from_dict(given))
    with pytest.raises(ConfigError) as e:
        Run.from_dict({**given, "label_smoothing": 0.1, "train_on": "all"})
    assert str(e.value).splitlines() == [
        f"train_on has no effect on task '{NAME}'; leave it out",
        f"label_smoothing has no effect on task '{NAME}'; leave it out",
    ]
    with pytest.raises(ConfigError, match=f"task '{NAME}' has no option 'beta'"):
        Run.from_dict({**given, "task_options": {"beta": 1}})
    with pytest.raises(ConfigError, match="unknown task 'toy-regresion'; did you mean 'toy-regression'"):
        Run.from_dict({**given, "task": "toy-regresion"})


def test_rows_of_other_columns_are_refused(place, tmp_path):
    given = settings(place, tmp_path / "run")
    bad = tiny.jsonl(tmp_path / "bad.jsonl", {"text": "a cat", "scroe": 1})
    with pytest.raises(DataError, match=r"column 'score'.*did you mean 'scroe'"):
        fit(Run.from_dict({**given, "data": str(bad)}), progress=False)
    plain = tmp_path / "a.txt"
    plain.write_text("a cat")
    with pytest.raises(DataError, match="columns must be text and score, got plain text"):
        fit(Run.from_dict({**given, "data": str(plain)}), progress=False)
    with pytest.raises(DataError, match="builtin:prose: columns must be text and score, got plain text"):
        fit(Run.from_dict({**given, "data": "builtin:prose"}), progress=False)
