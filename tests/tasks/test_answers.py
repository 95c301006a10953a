"""Answers: what counts as right, which question a text asks, and generation in batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import tiny

from veneer.data.pack import Segment
from veneer.data.reading import Reading
from veneer.errors import ConfigError, DataError
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.tasks import build
from veneer.tasks.text.answering import Question, asked, questions, same_json, same_text, text_of
from veneer.train.run import Run
from veneer.verbs.eval.evaluate import evaluate

TASK = "answers"
COLOURS = {"cat": "black", "dogs": "red", "moon": "white"}


def question(i: int) -> dict[str, str]:
    animal = list(COLOURS)[i % 3]
    return {"prompt": f"{tiny.text(i, 1 + i % 4).strip()} {animal}: ", "completion": COLOURS[animal]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    tiny.base(root / "base")
    for part, start, n in (("train", 0, 60), ("valid", 200, 18)):
        tiny.jsonl(root / f"{part}.jsonl", *(question(start + i) for i in range(n)))
    return root


def settings(place: Path, out: Path, **changed):
    given = tiny.settings(place, task=TASK, out=str(out), lr=3e-2, steps=40, batch=8, accumulate=1, length=64)
    own = {"data": str(place / "train.jsonl"), "valid": str(place / "valid.jsonl"), "known": "none"}
    return {**given, **own, "options": {"rank": 8}, "eval_every": 20, "eval_windows": None, **changed}


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fit(Run.from_dict(settings(place, place / "whole")), progress=False)
    return place / "whole"


def test_answers_are_learned_and_counted(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["metric"] == {"name": "right", "unit": "share of right answers", "lower_is_better": False}
    assert results["before"]["valid"] == 0.0 and results["after"]["valid"] >= 0.8
    assert results["others"]["after"]["valid"]["bpb"] < results["others"]["before"]["valid"]["bpb"]


def test_eval_counts_the_same_answers_with_an_interval(place, whole):
    found = evaluate(
        str(place / "base"),
        adapter=[f"own={whole}"],
        data=[str(place / "valid.jsonl")],
        task=TASK,
        length=64,
        progress=False,
    )
    line, bits = found.lines
    results = json.loads((whole / "results.json").read_text())
    assert (line.metric, line.n, line.base) == ("share of right answers", 18, 0.0)
    own = line.adapters["own"]
    assert own.value == pytest.approx(results["after"]["valid"]) and own.low > 0
    assert bits.metric == "bits per byte"


def test_the_report_shows_wrong_answers(whole):
    report(str(whole), measure=True, progress=False)
    examined = json.loads((whole / "results.json").read_text())["examined"]
    assert examined["asked"] == 18 and examined["right"] + len(examined["worst"]) == 18
    for row in examined["worst"]:
        assert row["truth"] != row["answer"] and row["truth"] in COLOURS.values()


def test_answers_in_a_batch_are_those_of_each_question_alone(place):
    model = pretrained.causal_lm(str(place / "base"), torch.float32, torch.device("cpu"))
    tokenizer = tiny.tokenizer()
    every = [
        Question(tokenizer(tiny.text(i, 2 + 3 * i))["input_ids"], tokenizer("red")["input_ids"])
        for i in range(5)
    ]
    together = asked(model, tokenizer, every, batch=8)
    alone = [asked(model, tokenizer, [q], batch=1)[0] for q in every]
    assert together == alone and len(set(together)) > 1
    # transformers' own greedy continuation of one prompt
    ids = torch.tensor([every[3].prompt])
    longest = len(every[3].truth) + 16
    own = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=longest)
    assert together[3] == text_of(own[0, ids.shape[1] :].tolist(), tokenizer, [tokenizer.eos_token_id])


def test_the_last_learned_answer_is_asked_for_behind_all_before_it():
    ids = torch.arange(10)
    labels = torch.tensor([-100, 2, 3, -100, -100, -100, 7, 8, -100, -100])
    window = (Segment(ids, labels, torch.ones(10)),)
    assert questions([window]) == [Question([0, 1, 2, 3, 4, 5, 6], [7, 8])]
    plain = (Segment(ids, ids + 1, torch.ones(10)),)
    assert questions([plain]) == [Question([0], [*range(1, 11)])]


@pytest.mark.parametrize(
    ("answer", "truth", "text", "parsed"),
    [
        ("red", "red", True, False),
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', False, True),
        ('{"a": 1}', '{"a": "1"}', False, False),
        ('{"a": 1} so', '{"a": 1}', False, False),
        ("", "1", False, False),
    ],
)
def test_right_is_the_same_text_or_the_same_json(answer, truth, text, parsed):
    assert (same_text(answer, truth), same_json(answer, truth)) == (text, parsed)


def test_bad_rows_are_named_before_anything_is_written(place, tmp_path):
    def run(*rows, **changed):
        data = str(tiny.jsonl(tmp_path / "bad.jsonl", *rows))
        fit(Run.from_dict(settings(place, tmp_path / "run", data=data, **changed)), progress=False)

    with pytest.raises(DataError, match=r"bad\.jsonl line 1: must be a prompt with its completion"):
        run({"text": "a cat"})
    with pytest.raises(DataError, match=r"bad\.jsonl line 2: the answer must be JSON"):
        rows = [{"prompt": "a", "completion": "{}"}, {"prompt": "b", "completion": "{"}]
        run(*rows, valid=(), task_options={"match": "json"})
    with pytest.raises(ConfigError, match="train_on has no effect on task 'answers'"):
        run(question(0), train_on="all")
    assert not (tmp_path / "run").exists()


def test_json_answers_of_other_spelling_are_right(place):
    task = build(TASK, tiny.tokenizer(), Reading(length=64), {"match": "json"})
    assert task.match == "json"
    with pytest.raises(ConfigError, match="task 'answers': match must be"):
        Run.from_dict(settings(place, place / "x", task_options={"match": "close"}))
