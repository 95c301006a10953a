"""The script that trains the built-in model, on small documents: it learns, stops, resumes and exports."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.pretraining import SMALL, log

from veneer.embedded import pretrain, texts


def test_it_learns_and_a_resumed_run_ends_where_an_uninterrupted_one_does(small, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tokens = ["--tokens", str(12 * 2 * 16 / 1e6)]  # twelve steps
    assert pretrain.main(["--out", str(whole), *tokens, *SMALL]) == 0
    assert (
        log(whole)[-1]["known_valid_bpb"] < log(whole)[0]["known_valid_bpb"] and log(whole)[-1]["step"] == 12
    )

    step, real = 0, pretrain.loss_of

    def stops_at_the_seventh(model, windows):
        nonlocal step
        if model.training:
            step += 1
            if step == 7:
                raise KeyboardInterrupt
        return real(model, windows)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pretrain, "loss_of", stops_at_the_seventh)
        pretrain.main(["--out", str(parts), *tokens, *SMALL])
    assert not (parts / "model").exists()
    assert pretrain.main(["--out", str(parts), *tokens, *SMALL]) == 0  # from the checkpoint of step 4
    a, b = (load_file(f / "model" / "model.safetensors") for f in (whole, parts))
    assert all(torch.equal(a[n], b[n]) for n in a) and {t.dtype for t in a.values()} == {torch.bfloat16}


def test_the_exported_model_opens_and_says_how_it_was_made(small, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrain.main(["--out", str(tmp_path), "--tokens", "0.0001", *SMALL])
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ids = tokenizer("def add(first", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "def add(first" and model(ids).logits.shape == (
        1,
        ids.shape[1],
        len(tokenizer),
    )
    facts = json.loads((tmp_path / "model" / "training.json").read_text())
    assert facts["data"]["library"]["documents"] == 4 and facts["data"]["tests"]["documents"] == 3
    assert facts["recipe"]["batch"] == 2 and "out" not in facts["recipe"]


def test_the_rate_rises_stays_and_falls():
    assert pretrain.rate(0, 0.5) == pytest.approx(0.01) and pretrain.rate(0.1, 0.5) == 1
    assert (
        pretrain.rate(0.5, 0.5) == 1
        and pretrain.rate(0.75, 0.5) == pytest.approx(0.5)
        and pretrain.rate(1, 0.5) == 0
    )


def test_what_is_held_out_is_not_trained_on():
    titles = {d.title for d in texts.library()}
    held = texts.heldout()
    assert not titles & {*held["valid"], *held["test"]} and not {*held["valid"]} & {*held["test"]}
    assert not any(
        part in t
        for t in titles
        for part in ("pydoc_data/", "encodings/", "site-packages/", "_sysconfigdata")
    )
    assert any(texts.is_test(t) for t in titles) == any(t.startswith("test/") for t in titles)


@pytest.mark.parametrize("name", [d for d in texts.DOMAINS if texts.has(d)])
def test_splits_are_whole_documents_and_a_tenth_each(name):
    parts = {s: texts.domain(name, s) for s in texts.SPLITS}
    titles = [d.title for s in parts for d in parts[s]]
    assert len(titles) == len(set(titles))
    total = sum(len(d.text) for s in parts for d in parts[s])
    for s in ("valid", "test"):
        assert 0.05 < sum(len(d.text) for d in parts[s]) / total <= 0.1


@pytest.mark.parametrize("name", [d for d in texts.DOMAINS if texts.has(d)])
def test_hardly_a_run_of_thirteen_words_is_in_two_splits(name):
    """Test text must not be training text; headers share their licence only."""

    def runs(split):
        words = [d.text.split() for d in texts.domain(name, split)]
        return {tuple(w[i : i + 13]) for w in words for i in range(len(w) - 12)}

    train = runs("train")
    for split in ("valid", "test"):
        own = runs(split)
        assert len(own & train) < 0.02 * len(own)


def test_a_text_that_is_missing_says_where_it_was_looked_for(monkeypatch):
    monkeypatch.setattr(texts, "_headers", list)
    with pytest.raises(
        texts.TextMissing, match=r"the interpreter lacks the text 'c' \(.*include.* is missing or empty\)"
    ):
        texts.domain("c", "train")
    assert not texts.has("c")
