"""Tasks on real pretrained weights: a short training of each must be seen in its figures."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny

from veneer.cli.frame import main
from veneer.embedded import bank
from veneer.runs.fit import fit
from veneer.train.run import Run

pytestmark = pytest.mark.real


def settings(folder, task, model, **changed):
    own = {"task": task, "model": str(model), "known": "none", "device": "cpu", "report": False}
    parts = {part: str(folder / f"{part}.jsonl") for part in ("data", "valid")}
    return Run.from_dict({**own, **parts, "options": {"rank": 8}, "out": str(folder / "run"), **changed})


def test_minilm_learns_to_tell_good_films_from_bad(real, tmp_path):
    text = (real("vader") / "films.jsonl").read_text("utf-8")
    rated = [row for row in map(json.loads, text.splitlines()) if abs(row["rating"]) >= 1.5][::7][:400]
    rows = [{"text": r["text"], "label": "good" if r["rating"] > 0 else "bad"} for r in rated]
    tiny.jsonl(tmp_path / "data.jsonl", *rows[:300])
    tiny.jsonl(tmp_path / "valid.jsonl", *rows[300:])
    run = settings(
        tmp_path,
        "sequence-classification",
        real("minilm"),
        steps=40,
        batch=16,
        length=64,
        lr=2e-3,
        eval_every=40,
        precision="fp32",
    )
    result = fit(run, progress=False)
    assert result.learned.before < 0.65 and result.learned.after > result.learned.before + 0.1
    assert result.metrics["trainable_parameters"] < 0.02 * 22_713_216


def test_smollm2_writes_answers_that_are_counted(real, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veneer.data.reading import Reading
    from veneer.runs.texts import texts
    from veneer.runs.texts.sources import rows
    from veneer.tasks import build
    from veneer.train.loop.progress import Notes

    path = tiny.jsonl(tmp_path / "test.jsonl", *bank.rows("test", 4))
    folder = real("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    reading = Reading(length=256, packing=False)
    task = build("answers", AutoTokenizer.from_pretrained(folder), reading, {"match": "json"})
    examples = texts.prepare(rows([str(path)], "test"), task, Notes()).examples
    right, bits = task.measure(model, examples, batch=4, each=True)
    assert right.value == 0.0 and right.weights.sum() == 4  # it knows no such format before a training
    assert 0.5 < bits.value < 6


def test_intents_are_learned_with_no_flag_but_model_data_and_out(real, tmp_path):
    """The first run of a stranger: right answers before and after stand in the report."""
    data = tiny.jsonl(tmp_path / "bank.jsonl", *bank.rows("train", 64))
    out = tmp_path / "run"
    assert main(["fit", "--model", str(real("smollm2")), "--data", str(data), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["learned"]["after"] < results["learned"]["before"]
    found = results["answers"]
    assert found["text"] == "valid" and found["asked"] == len(found["rows"]) >= 3
    assert found["before"] == 0 <= found["after"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{found['after']} of {found['asked']}" in page and "Right answers" in page
