"""Definitions behind the tasks of texts: spans, hidden tokens, partners, overlaps, programs, losses."""

from __future__ import annotations

import math
import time

import pytest
import torch
from support import heads, tiny
from torch.nn.functional import cross_entropy

from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.tasks import build
from veneer.tasks.measures import overlaps, programs, spans
from veneer.train.run import Run

READING = Reading(length=64)


def encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    places = dict(vocab_size=len(tiny.tokenizer()), max_position_embeddings=128)
    return BertModel(BertConfig(**heads.SIZES, **places)).eval()


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", {(1, 3, "X")}),
        ("B-X B-X I-Y", {(0, 1, "X"), (1, 2, "X"), (2, 3, "Y")}),
        ("I-X I-X", {(0, 2, "X")}),
        ("B-X I-X", {(0, 2, "X")}),
        ("O O", set()),
    ],
)
def test_spans_begin_and_end_as_their_classes_say(tags, found):
    assert spans.spans(tags.split()) == found


def test_f1_counts_whole_spans_or_classes():
    names = ("O", "B-X", "I-X")
    pairs = [([1, 2, 0, 1], [1, 0, 0, 1]), ([0, 1], [0, 1])]
    # true: (0,2), (3,4), (1,2); found: (0,1), (3,4), (1,2); two are right
    assert spans.f1(pairs, names) == pytest.approx(2 * 2 / 6)
    assert spans.accuracy(pairs).value == pytest.approx(5 / 6)
    plain = [([0, 0, 1, 1], [0, 1, 1, 1])]
    assert spans.f1(plain, ("noun", "verb")) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert spans.f1([([0], [0])], names) == 0.0


def test_the_first_token_of_a_word_carries_its_class():
    task = build("token-classification", tiny.tokenizer(), READING, {"labels": ("O", "B-X")})
    words = ["cat", "moonlight", "a"]
    one = task.encode(Row("tagged", {"tokens": words, "tags": ["B-X", "O", "B-X"]}, "here"))
    learned = one.content["labels"][one.content["labels"] != -100]
    assert learned.tolist() == [1, 0, 1] and len(one.content["labels"]) > 3
    with pytest.raises(DataError, match="here: there must be one class for each of 2 words, got 1"):
        task.encode(Row("tagged", {"tokens": ["a", "b"], "tags": ["O"]}, "here"))
    with pytest.raises(DataError, match="here: label 'B-Y' is not among the classes"):
        task.encode(Row("tagged", {"tokens": ["a"], "tags": ["B-Y"]}, "here"))


@pytest.fixture(scope="module")
def masker(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(heads.base(tmp_path_factory.mktemp("masked"), "masked"))


def test_hidden_tokens_have_berts_shares_and_labels(masker):
    task = build("masked-lm", masker, Reading(length=2000), {"share": 0.25})
    (window,) = task.pieces(task.encode(Row("text", {"text": tiny.text(1, 1200)}, "here")), 2000)
    batch, n = task.collate([window]), task.labels(window)
    hidden = task.hidden(batch, torch.Generator().manual_seed(0))
    learned = hidden["labels"] != -100
    own = task.size(window) - sum(i is not None for i in task.ends)
    assert int(learned.sum()) == n == round(0.25 * own)
    assert torch.equal(hidden["labels"][learned], batch["input_ids"][learned])
    assert torch.equal(hidden["input_ids"][~learned], batch["input_ids"][~learned])
    shown = hidden["input_ids"][learned]
    masked = float((shown == masker.mask_token_id).float().mean())
    kept = float((shown == batch["input_ids"][learned]).float().mean())
    slack = 4 * math.sqrt(0.16 / n)
    assert abs(masked - 0.8) < slack and abs(kept - 0.1) < slack
    again = task.hidden(batch, torch.Generator().manual_seed(0))
    assert torch.equal(again["input_ids"], hidden["input_ids"])
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        build("masked-lm", tiny.tokenizer(), READING)


def test_the_contrastive_loss_is_infonce_of_the_batch():
    model, task = encoder(), build("embeddings", tiny.tokenizer(), READING, {"temperature": 0.1})
    rows = [
        Row("partners", {"anchor": tiny.text(i, 5), "positive": tiny.text(i + 9, 3)}, "") for i in range(4)
    ]
    examples = [task.pieces(task.encode(row), 64)[0] for row in rows]
    loss, n = task.loss(model, task.collate(examples))
    one_by_one = []
    for e in examples:  # without padding
        pair = [model(input_ids=e[k][None])[0][0].mean(0) for k in ("input_ids", "other_ids")]
        one_by_one.append([v / v.norm() for v in pair])
    cosines = torch.stack([torch.stack([a @ b for _, b in one_by_one]) for a, _ in one_by_one])
    assert n == 4
    torch.testing.assert_close(loss, cross_entropy(cosines / 0.1, torch.arange(4), reduction="sum"))
    nearest, mrr = task.measure(model, examples, batch=3)
    ranks = (cosines >= cosines.diag()[:, None]).sum(1)
    assert nearest.value == pytest.approx(float((ranks == 1).double().mean()))
    assert mrr.value == pytest.approx(float((1 / ranks).mean()))


def test_poolers_that_no_vector_uses_are_not_trained(tmp_path):
    heads.base(tmp_path / "base")
    heads.write(tmp_path, lambda i: {"anchor": tiny.text(i, 6), "positive": tiny.text(i, 3)}, (24, 8, 8))
    for method, options, lr in (("lora", {"rank": 2}, 1e-2), ("full", {}, 1e-3)):
        out = tmp_path / method
        run = heads.settings(tmp_path, "embeddings", out, method=method, options=options, steps=3, lr=lr)
        fit(Run.from_dict(run), progress=False)
        from veneer.files import read_json

        assert not [s for s in read_json(out / "adapter" / "veneer.json")["sites"] if "pooler" in s]


def test_ratings_out_of_range_are_named():
    task = build("embedding-similarity", tiny.tokenizer(), READING, {"most": 5.0})
    row = {"sentence1": "a", "sentence2": "b", "score": 4}
    assert float(task.encode(Row("sentences", row, "here")).content["target"]) == pytest.approx(0.8)
    for score in (5.5, -1, "high", None):
        with pytest.raises(DataError, match="here: rating must be a number from 0 to 5"):
            task.encode(Row("sentences", {**row, "score": score}, "here"))


def test_overlaps_are_those_of_the_libraries():
    bleu, rouge = overlaps.figures(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert rouge.value == pytest.approx(5 / 6)
    grams = [5 / 6, 3 / 5, 2 / 4, 1 / 3]  # n-grams in common; lengths are equal, so there is no penalty
    assert bleu.value == pytest.approx(100 * math.exp(sum(map(math.log, grams)) / 4))


def test_a_decoder_alone_is_no_encoder_and_decoder(tmp_path):
    heads.base(tmp_path / "base", "lm")
    heads.write(tmp_path, lambda i: {"source": "a cat", "target": f"a {i}"}, (24, 8, 8))
    with pytest.raises(ConfigError, match="holds no readable model for AutoModelForSeq2SeqLM"):
        fit(Run.from_dict(heads.settings(tmp_path, "text-to-text", tmp_path / "run")), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("x = 1\nassert x == 1", ""),
        ("assert 1 == 2", "AssertionError"),
        ("while True: pass", "stopped after|status -"),
        ("x = 'a' * (1 << 31)", "MemoryError"),
        ("import socket; socket.socket()", "socket.__new__ is refused"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen is refused"),
        ("import os; os.system('true')", "os.system is refused"),
        ("open('/tmp/written-by-a-model', 'w')", "writing outside the working directory is refused"),
        ("open('own', 'w').write('a'); assert open('own').read() == 'a'", ""),
        ("open('own', 'w').write('a' * (1 << 21))", "File too large|status -"),
        ("import os; assert 'PATH' not in os.environ", ""),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_programs_run_with_limits(program, why):
    import re

    begun, seconds = time.monotonic(), 1.0 if program.startswith("while True") else 4.0
    found = programs.failure(program, seconds)
    assert re.search(why, found) if why else found == ""
    assert time.monotonic() - begun < 15
    assert programs.passes(program, seconds) == (not why)


@pytest.mark.parametrize(("k", "n", "passed"), [(1, 1, 1), (1, 5, 2), (3, 5, 2), (5, 5, 0), (2, 4, 3)])
def test_pass_at_k_is_the_chance_that_one_of_k_passes(k, n, passed):
    from itertools import combinations

    draws = list(combinations([True] * passed + [False] * (n - passed), k))
    assert programs.pass_at(k, n, passed) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_human_evals_rows_are_tested_by_their_entry_point():
    task = build("code", tiny.tokenizer(), READING)
    row = {
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(g):\n    assert g() == 1\n",
        "entry_point": "f",
    }
    one = task.encode(Row("human-eval", row, "here")).content
    program = row["prompt"] + row["canonical_solution"] + bytes(one["test"].tolist()).decode()
    assert program.endswith("check(f)") and programs.passes(program, 4.0)
    assert not programs.passes(program.replace("return 1", "return 2"), 4.0)
    with pytest.raises(ConfigError, match=r"samples must be k \(3\) or more, got 1"):
        build("code", tiny.tokenizer(), READING, {"k": 3})


def test_a_loss_of_your_own_is_learned(tmp_path):
    heads.base(tmp_path / "base")
    heads.write(tmp_path, heads.animal)
    given = heads.settings(tmp_path, "sequence-classification", tmp_path / "own")

    def focal(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nats = cross_entropy(logits, batch["target"], reduction="none")
        return ((1 - (-nats).exp()) ** 2 * nats).sum(), len(nats)

    result = fit(Run.from_dict(given), progress=False, objective=focal)
    assert result.learned.after > result.learned.before and result.learned.after >= 0.9
    losses = [line["loss"] for line in tiny.metrics(tmp_path / "own") if "loss" in line]
    assert losses[0] < 0.5 * math.log(2)  # (1 - 1/2)^2 of the cross-entropy, at the start
    from veneer.files import read_json

    assert "focal" in read_json(tmp_path / "own" / "config.json")["objective"]
    for wrong, words in ((lambda m, b: 1.0, "got a float"), (lambda m, b: (torch.ones(2), 2), r"got \(2,\)")):
        run = Run.from_dict({**given, "out": str(tmp_path / "wrong")})
        with pytest.raises(ConfigError, match=words):
            fit(run, progress=False, objective=wrong)
        assert not (tmp_path / "wrong").exists()
