"""Classes and numbers for texts: rows of GLUE, figures of a library, a head that travels with the adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from support import heads, tiny
from support.resuming import Killed, assert_same, killed_at

import veneer
from veneer.data.reading import Reading
from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.tasks import build
from veneer.tasks.measures import scores
from veneer.train.folder import task_record
from veneer.train.run import Run
from veneer.verbs.eval.evaluate import evaluate

CLASSES, NUMBERS = "sequence-classification", "sequence-regression"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sequences")
    heads.base(root / "base")
    heads.write(root, heads.animal)
    return root


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(heads.settings(place, CLASSES, place / "whole")), progress=False)
    return place / "whole"


def test_it_learns_and_reports_accuracy_f1_and_mcc(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["metric"]["name"] == "accuracy" and not results["metric"]["lower_is_better"]
    assert results["after"]["valid"] >= 0.9 > results["before"]["valid"]
    assert results["others"]["after"]["valid"].keys() == {"f1", "mcc"}
    assert json.loads((whole / "config.json").read_text())["run"]["task_options"] == {
        "labels": ["cat", "dogs"]
    }
    assert task_record.read(whole / "adapter") == (CLASSES, {"labels": ["cat", "dogs"]})


def test_figures_are_those_of_the_definitions():
    truths, answers = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]
    accuracy, f1, mcc = scores.of_classes(truths, answers, 2)
    assert accuracy.value == pytest.approx(4 / 6)
    assert f1.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert mcc.value == pytest.approx((2 * 2 - 1 * 1) / 9)
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 8.0])
    pearson, spearman, mse = scores.of_numbers(x, y)
    assert pearson.value == pytest.approx(10.0 / (5.0 * 29.0) ** 0.5)
    assert (spearman.value, mse.value) == (pytest.approx(0.8), pytest.approx((1 + 1 + 16) / 4))
    assert scores.of_numbers(x, torch.ones(4))[0].value == 0.0


def test_it_resumes_after_a_kill_bit_for_bit(place, tmp_path, monkeypatch):
    given = heads.settings(place, CLASSES, tmp_path / "run")
    reference = tmp_path / "reference"
    fit(Run.from_dict({**given, "out": str(reference)}), progress=False)
    with monkeypatch.context() as patch:
        killed_at(patch, 8)
        with pytest.raises(Killed):
            fit(Run.from_dict(given), progress=False)
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    assert_same(given, reference)


def test_eval_takes_the_classes_of_the_training(place, whole):
    found = evaluate(
        str(place / "base"),
        adapter=[f"own={whole}"],
        data=[str(place / "valid.jsonl")],
        task=CLASSES,
        progress=False,
    )
    results = json.loads((whole / "results.json").read_text())
    line = found.lines[0]
    assert (line.metric, line.n) == ("accuracy", 24)
    assert line.base == pytest.approx(results["before"]["valid"])
    assert line.adapters["own"].value == pytest.approx(results["after"]["valid"])


def test_the_report_shows_mistaken_classes_and_the_worst_examples(whole):
    report(str(whole), measure=True, progress=False)
    examined = json.loads((whole / "results.json").read_text())["examined"]
    counts = torch.tensor(examined["confusion"]["counts"])
    assert counts.sum() == examined["n"] == 24 and counts.trace() >= 22
    losses = [w["loss"] for w in examined["worst"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 12
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Rows: the true class; columns: the answer." in page
    assert "12 examples with the largest loss" in page


def loaded(place: Path, kind: str, seed: int = 1):
    """Returns the base as a user loads it: with a random head that no file holds."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSequenceClassification.from_pretrained(place / kind, num_labels=2).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % 200 + 3
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_opens_the_adapter_and_its_head_with_equal_outputs(place, tmp_path, kind, method):
    peft = pytest.importorskip("peft")
    heads.base(place / kind, kind)
    run = heads.settings(place, CLASSES, tmp_path / "run", model=str(place / kind), steps=4, method=method)
    fit(Run.from_dict({**run, "known": "none"}), progress=False)
    adapter = tmp_path / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    saved = {"llama": ["score"], "distilbert": ["classifier", "pre_classifier"]}
    assert (config["modules_to_save"], config["task_type"]) == (saved.get(kind, ["classifier"]), "SEQ_CLS")
    ours = veneer.load(loaded(place, kind), adapter)
    theirs = peft.PeftModel.from_pretrained(loaded(place, kind, seed=2), str(adapter)).eval()
    expected = logits(ours)
    assert not torch.allclose(expected, logits(loaded(place, kind)), atol=1e-3)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_adapter_and_head_of_peft_open_with_equal_outputs(place, tmp_path, kind):
    peft = pytest.importorskip("peft")
    heads.base(place / kind, kind)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    theirs = peft.get_peft_model(loaded(place, kind), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    theirs.save_pretrained(tmp_path / "peft")
    ours = veneer.load(loaded(place, kind, seed=5), tmp_path / "peft")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_trains_the_head_too(place, tmp_path):
    given = heads.settings(place, CLASSES, tmp_path / "run", method="full", options={}, lr=3e-3, steps=20)
    result = fit(Run.from_dict(given), progress=False)
    assert result.learned.after >= 0.9


@pytest.mark.parametrize(
    "names",
    [
        ("text_a", "text_b"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("premise", "hypothesis"),
    ],
)
def test_pairs_in_the_columns_of_glue_become_one_sequence(place, tmp_path, names):
    row = {**dict(zip(names, ("a cat", "seven dogs"), strict=True)), "label": 1}
    tiny.jsonl(tmp_path / "train.jsonl", *[{**row, "label": i % 3} for i in range(30)])
    given = heads.settings(place, CLASSES, tmp_path / "run", data=str(tmp_path / "train.jsonl"), steps=1)
    fit(Run.from_dict({**given, "valid": (), "known": "none"}), progress=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["task_options"] == {"labels": ["0", "1", "2"]}
    task = build(CLASSES, tiny.tokenizer(), Reading(length=64), {"labels": ("0", "1", "2")})
    from veneer.data.row_files import Row

    kind = next(k for k, columns in task.FORMS.items() if columns[:-1] == names)
    one = task.encode(Row(kind, row, "here"))
    alone = [i for text in ("a cat", "seven dogs") for i in tiny.tokenizer()(text)["input_ids"]]
    assert set(alone) <= set(one.content["input_ids"].tolist()) and int(one.content["target"]) == 1


def test_numbers_are_learned_and_measured_by_their_correlation(place, tmp_path):
    def rated(seed):
        row = heads.animal(seed)
        return {"text_a": row["text"], "text_b": "cats", "label": 2.5 if row["label"] == "cat" else -0.5}

    heads.write(tmp_path, rated)
    given = heads.settings(tmp_path, NUMBERS, tmp_path / "run", model=str(place / "base"), steps=30)
    result = fit(Run.from_dict(given), progress=False)
    assert result.metric.name == "pearson" and result.learned.after > 0.5
    assert result.metrics["others"]["after"]["valid"].keys() == {"spearman", "mse"}


def test_labels_that_do_not_fit_are_named_with_file_and_row(place, tmp_path):
    def run(task, **files):
        made = {part: str(tiny.jsonl(tmp_path / f"{part}.jsonl", *rows)) for part, rows in files.items()}
        return fit(Run.from_dict(heads.settings(place, task, tmp_path / "run", **made)), progress=False)

    good = [heads.animal(i) for i in range(20)]
    with pytest.raises(DataError) as e:
        run(CLASSES, data=good, valid=[good[0], {"text": "a", "label": "bird"}, {"text": "b", "label": "ox"}])
    lines = str(e.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{tmp_path / 'valid.jsonl'} line 2: label 'bird' is not")
    with pytest.raises(DataError, match=r"line 1: label must be 0 or more, got -1"):
        run(CLASSES, data=[{"text": "a", "label": -1}, {"text": "b", "label": 0}])
    with pytest.raises(DataError, match=r"line 2: label must be a text or a whole number, got 0\.5"):
        run(CLASSES, data=[{"text": "a", "label": 1}, {"text": "b", "label": 0.5}])
    with pytest.raises(DataError, match="two classes or more, got cat in all rows"):
        run(CLASSES, data=[{"text": "a", "label": "cat"}] * 12)
    with pytest.raises(DataError, match=r"line 1: label must be a finite number, got 'high'"):
        run(NUMBERS, data=[{"text": "a", "label": "high"}] * 12)
    with pytest.raises(DataError, match=r"column 'text' must be text, got 3"):
        run(CLASSES, data=[{"text": 3, "label": "a"}, {"text": "3", "label": "b"}] * 6)
    assert not (tmp_path / "run").exists()


def test_a_base_whose_class_has_no_such_task_is_refused(place, tmp_path):
    from transformers import T5Config, T5EncoderModel

    T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "base"
    )
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "whisper"}))
    given = heads.settings(place, CLASSES, tmp_path / "run", model=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match="holds no readable model for AutoModelForSequenceClassification"):
        fit(Run.from_dict(given), progress=False)
    assert not (tmp_path / "run").exists()


def test_missing_metrics_packages_are_named_at_the_door(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs scikit-learn: pip install 'veneer\[metrics\]'"):
        build(CLASSES, tiny.tokenizer(), Reading(length=8))
