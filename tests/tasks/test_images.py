"""Classification of pictures: folders of classes, a saved head, a confusion matrix, and bad files by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families, senses, tiny

import veneer
from veneer import tasks
from veneer.errors import ConfigError, DataError
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.train.run import Run
from veneer.verbs.eval.evaluate import evaluate

pytest.importorskip("PIL")
NAME = "image-classification"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    senses.picture_base(root / "vit", "vit")
    senses.picture_base(root / "resnet", "resnet")
    for part, n, seed in (("train", 20, 1), ("valid", 8, 2)):
        senses.pictured(root / "shapes" / part, n, seed)
    return root


def settings(place: Path, out: Path, **changed: Any) -> dict[str, Any]:
    given = {"batch": 12, "eval_every": 20, **changed}
    return senses.settings(place / "vit", NAME, place / "shapes", out, **given)


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(settings(place, place / "run")), progress=False)
    return place / "run"


def test_a_folder_of_classes_is_learned(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["metric"]["name"] == "accuracy"
    assert results["after"]["valid"] >= 0.8 > results["before"]["valid"]
    assert json.loads((whole / "config.json").read_text())["run"]["task_options"] == {
        "labels": list(senses.SHAPES)
    }


def test_the_head_is_saved_with_the_adapter_and_peft_reads_both(place, whole):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    options = {"id2label": dict(enumerate(senses.SHAPES))}
    ours = pretrained.model(
        str(place / "vit"), tasks.get(NAME).AUTO, torch.float32, CPU, options=options, new_head=True
    )
    veneer.load(ours, whole / "adapter")
    x = torch.randn(2, 3, 32, 32)
    base = AutoModelForImageClassification.from_pretrained(place / "vit", num_labels=3)
    theirs = PeftModel.from_pretrained(base, whole / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(ours(pixel_values=x).logits, theirs(pixel_values=x).logits, atol=1e-4)


def test_the_report_has_a_confusion_matrix_and_the_worst_pictures(whole):
    assert report(str(whole), measure=True, progress=False)["missing"] == []
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in page and "the true class" in page
    found = json.loads((whole / "results.json").read_text())["examined"]
    assert found["confusion"]["names"] == list(senses.SHAPES)
    assert sum(map(sum, found["confusion"]["counts"])) == found["n"] == 24


def test_eval_agrees_with_the_run(place, whole):
    found = evaluate(
        str(place / "vit"),
        adapter=[f"own={whole}"],
        data=[str(place / "shapes" / "valid")],
        task=NAME,
        progress=False,
    )
    line = next(each for each in found.lines if each.metric == "accuracy")
    results = json.loads((whole / "results.json").read_text())
    assert line.n == 24 and line.adapters["own"].value == pytest.approx(results["after"]["valid"])


def test_rows_of_a_table_and_a_conv_net(place, tmp_path):
    rows = [
        {"image": str(f), "label": f.parent.name} for f in sorted((place / "shapes" / "train").rglob("*.png"))
    ]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    changed = {"model": str(place / "resnet"), "data": str(data), "to": families.CONVOLUTIONS}
    result = fit(Run.from_dict(settings(place, tmp_path / "run", **changed)), progress=False)
    assert result.learned.after >= 0.7 > result.learned.before
    # The statistics of batch norms stay those of the base, so that a fresh base gives the same answers.
    found = evaluate(
        str(place / "resnet"),
        adapter=[f"own={tmp_path / 'run'}"],
        data=[str(place / "shapes" / "valid")],
        task=NAME,
        progress=False,
    )
    line = next(each for each in found.lines if each.metric == "accuracy")
    assert line.adapters["own"].value == pytest.approx(result.learned.after)


def test_full_fine_tuning_is_a_change_too(place, tmp_path):
    changed = {"model": str(place / "resnet"), "method": "full", "options": {}, "lr": 3e-3, "steps": 30}
    result = fit(Run.from_dict(settings(place, tmp_path / "run", **changed)), progress=False)
    assert result.learned.after > result.learned.before


def test_bad_pictures_and_labels_are_named_by_row(place, tmp_path):
    good = next((place / "shapes" / "train").rglob("*.png"))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    rows = [
        {"image": str(good), "label": "square"},
        {"image": "cut.png", "label": "circle"},
        {"image": "text.png", "label": "circle"},
        {"image": "lost.png", "label": "square"},
        {"image": 3, "label": "square"},
    ]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError) as e:
        fit(Run.from_dict(settings(place, tmp_path / "run", data=str(data), valid="none")), progress=False)
    text = str(e.value)
    assert f"rows.jsonl line 2: the image {tmp_path / 'cut.png'} must be a picture that decodes" in text
    assert f"line 3: the image {tmp_path / 'text.png'} must be a picture that decodes" in text
    assert f"line 4: the image {tmp_path / 'lost.png'} does not exist" in text
    assert "line 5: 'image' must be the path of a file, got 3" in text and "line 1" not in text
    odd = tiny.jsonl(tmp_path / "odd.jsonl", {"image": str(good), "label": "heptagon"})
    with pytest.raises(
        DataError, match=r"odd.jsonl line 1: label 'heptagon' is not among the classes to learn"
    ):
        fit(Run.from_dict(settings(place, tmp_path / "run", valid=str(odd))), progress=False)
    assert not (tmp_path / "run").exists()


def test_labels_out_of_range_or_of_another_kind_are_named_by_row(place, tmp_path):
    good = str(next((place / "shapes" / "train").rglob("*.png")))
    rows = [{"image": good, "label": label} for label in (0, 1, 2, 3, -1, 1.5, "", ["1"])]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    named = {"task_options": {"labels": ["0", "1", "2"]}}
    for part in ("data", "valid"):
        given = {"data": str(tiny.jsonl(tmp_path / "few.jsonl", *rows[:3])), part: str(data), **named}
        with pytest.raises(DataError) as e:
            fit(
                Run.from_dict(settings(place, tmp_path / "run", **{"valid": "none", **given})), progress=False
            )
        text = str(e.value)
        for line, says in (
            (4, "label '3' is not among the classes to learn (0, 1, 2)"),
            (5, "label '-1' is not among the classes to learn (0, 1, 2)"),
            (6, "label must be a text or a whole number, got 1.5"),
            (7, "label must be a text or a whole number, got ''"),
            (8, "label must be a text or a whole number, got ['1']"),
        ):
            assert f"rows.jsonl line {line}: {says}" in text, (part, line, text)
        assert "line 3:" not in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [-1, 1.5, None])
def test_labels_that_decide_the_classes_must_be_names(place, tmp_path, label):
    good = str(next((place / "shapes" / "train").rglob("*.png")))
    rows = [{"image": good, "label": each} for each in (0, 1, label)]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError, match=r"rows.jsonl line 3: label must be"):
        fit(Run.from_dict(settings(place, tmp_path / "run", data=str(data), valid="none")), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_stream_names_a_bad_row(place, tmp_path):
    files = sorted((place / "shapes" / "train").rglob("*.png"))
    (tmp_path / "text.png").write_text("no picture")
    rows = [{"image": str(f), "label": f.parent.name} for f in files]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows, {"image": "text.png", "label": "circle"})
    run = settings(place, tmp_path / "run", data=str(data), stream=True, buffer=8, steps=40, eval_every=40)
    with pytest.raises(DataError, match=r"rows.jsonl line 61: the image .*text.png must be a picture that"):
        fit(Run.from_dict(run), progress=False)


def test_eval_names_a_bad_row_and_writes_nothing(place, whole, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    data = tiny.jsonl(tmp_path / "rows.jsonl", {"image": "text.png", "label": "circle"})
    with pytest.raises(DataError, match=r"rows.jsonl line 1: the image .*text.png must be a picture that"):
        evaluate(str(place / "vit"), adapter=[f"own={whole}"], data=[str(data)], task=NAME, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"text.png", "rows.jsonl"}


def test_folders_that_are_not_of_classes_are_refused(place, tmp_path):
    (tmp_path / "flat").mkdir()
    good = next((place / "shapes" / "train").rglob("*.png"))
    (tmp_path / "flat" / "a.png").write_bytes(good.read_bytes())
    with pytest.raises(DataError, match=r"a.png: the file must be in a folder named after its class"):
        fit(Run.from_dict(settings(place, tmp_path / "run", data=str(tmp_path / "flat"))), progress=False)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: the folder must hold .png, .jpg, .* files, got it is empty"):
        fit(Run.from_dict(settings(place, tmp_path / "run", data=str(tmp_path / "none"))), progress=False)


def test_a_model_without_an_image_processor_is_refused(place, tmp_path):
    tiny.base(tmp_path / "text")
    with pytest.raises(ConfigError, match=r"the folder .*text holds no readable processor"):
        fit(Run.from_dict(settings(place, tmp_path / "run", model=str(tmp_path / "text"))), progress=False)
