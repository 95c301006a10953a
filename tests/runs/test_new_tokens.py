"""New tokens through the program: trained, resumed, measured, merged and exported with their tokenizer."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from support import tiny
from support.resuming import assert_same
from transformers import AutoModelForCausalLM, AutoTokenizer

import veneer
from veneer.cli.frame import main
from veneer.errors import ConfigError, VeneerError
from veneer.models import adapted
from veneer.runs.fit import fit, fit_until
from veneer.train.run import Run

NEW = ("<call>", "</call>")


def given(folder, tied=True, **changed):
    """Settings of a run on texts with new tokens."""
    if not (folder / "base").exists():
        tiny.base(folder / "base", tie_word_embeddings=tied)
        marked = tiny.text(1, 900).replace("cat", "<call>cat</call>")
        (folder / "train.txt").write_text(marked, encoding="utf-8")
        (folder / "valid.txt").write_text(tiny.text(2, 120).replace("cat", "<call>cat</call>"), "utf-8")
        (folder / "known.txt").write_text(tiny.text(3, 120), encoding="utf-8")
    return tiny.settings(folder, add_tokens=NEW, **changed)


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_trains_the_rows_alone_and_every_command_takes_its_tokens(tied, tmp_path, capsys):
    options = {k: v for k, v in given(tmp_path, tied, steps=6, report=True).items() if k != "add_tokens"}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(options), encoding="utf-8")
    assert main(["fit", "--config", str(config), "--add-tokens", NEW[0], "--add-tokens", NEW[1]]) == 0
    adapter = tmp_path / "run" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer.convert_tokens_to_ids(list(NEW))
    rows = len(tiny.tokenizer())
    assert ids == [rows, rows + 1] and tokenizer.encode("a<call>b")[1] == rows
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["trainable_token_indices"]["model.embed_tokens"] == ids
    assert ("lm_head" in settings["trainable_token_indices"]) != tied

    x = torch.tensor([tokenizer.encode("the <call>cat</call> sat on")])
    opened, _ = adapted.open_all([str(tmp_path / "run")])
    y = logits(opened.model, x)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(logits(theirs, x), y, rtol=1e-5, atol=1e-5)

    merged = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run"), "--out", str(merged), "--dtype", "fp32"]) == 0
    exported = tmp_path / "exported"
    command = ["export", str(tmp_path / "base"), "--adapter", str(tmp_path / "run"), "--out", str(exported)]
    assert main([*command, "--dtype", "fp32"]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for folder in (merged, exported):
        model = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)
        assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(NEW)) == ids
        before = {"embed": plain.get_input_embeddings(), "head": plain.get_output_embeddings()}
        after = {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        for end, module in after.items():
            assert torch.equal(module.weight[:rows], before[end].weight)
            assert module.weight[rows:].any(dim=1).all()
        assert (after["embed"].weight is after["head"].weight) == tied

    capsys.readouterr()
    command = ["eval", str(tmp_path / "base"), "--adapter", str(tmp_path / "run"), "--length", "32"]
    assert main([*command, "--data", str(tmp_path / "valid.txt"), "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    learned = json.loads((tmp_path / "run" / "results.json").read_text())["learned"]
    assert line["adapters"]["run"]["value"] < line["base"]
    assert learned["after"] < learned["before"]
    assert main(["generate", "the <call>", "--adapter", str(tmp_path / "run"), "--tokens", "3"]) == 0
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert main(["report", str(tmp_path / "run"), "--measure"]) == 0
    assert main(["data", "show", "--config", str(config), "--add-tokens", NEW[0], "--json"]) == 0


def test_a_resumed_run_is_the_run_in_one_go(tmp_path):
    whole = fit(Run.from_dict(given(tmp_path, out=str(tmp_path / "whole"))), progress=False).folder
    parts = given(tmp_path, out=str(tmp_path / "parts"), resume=True)
    fit_until(Run.from_dict(parts), 5)
    fit_until(Run.from_dict(parts), 14)
    assert_same(parts, whole)


@pytest.mark.parametrize("method", ["oft", "prefix"])
def test_methods_beside_which_peft_writes_no_rows_are_kept_in_our_layout(method, tmp_path):
    options = {"block": 4} if method == "oft" else {"length": 3}
    run = given(tmp_path, method=method, options=options, steps=3)
    fit(Run.from_dict(run), progress=False)
    assert (tmp_path / "run" / "adapter" / "delta.safetensors").exists()
    opened, _ = adapted.open_all([str(tmp_path / "run")])
    assert len(opened.model.get_input_embeddings().weight) == len(tiny.tokenizer()) + 2
    if method == "oft":
        x = torch.tensor([opened.tokenizer.encode("the <call>cat")])
        y = logits(opened.model, x)
        veneer.merge(opened.model, "run")
        torch.testing.assert_close(logits(opened.model, x), y, rtol=1e-4, atol=1e-4)
        assert opened.model.get_input_embeddings().weight is opened.model.get_output_embeddings().weight


def test_settings_that_cannot_go_with_new_tokens_are_refused_together(tmp_path):
    bad = {"method": "full", "options": {}, "shard": True, "task": "dpo", "add_tokens": (" ", "<a>", "<a>")}
    with pytest.raises(ConfigError) as e:
        Run.from_dict({"data": ("x.txt",), **bad})
    text = str(e.value)
    assert "tokens must not be empty, got ' '; leave it out" in text
    assert "tokens must differ, got '<a>' 2 times" in text
    assert "method 'full' trains all rows" in text
    assert "needs the embedding whole" in text
    assert "task 'dpo' compares with the base, in which the rows of new tokens are zeros" in text
    with pytest.raises(ConfigError, match="needs a task with a tokenizer"):
        Run.from_dict({"data": ("x",), "task": "image-classification", "add_tokens": ("<a>",)})
    with pytest.raises(ConfigError, match="below the blocks of"):
        Run.from_dict({"data": ("x",), "cache_frozen": True, "add_tokens": ("<a>",)})


def test_a_known_token_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"tokens must be new, got 'cat', which has the id \d+; leave it"):
        fit(Run.from_dict({**given(tmp_path), "add_tokens": ("cat", "<b>")}), progress=False)
    assert not (tmp_path / "run").exists()


def test_adapters_of_different_tokens_are_refused_by_name(tmp_path):
    for name, tokens in (("a", NEW), ("b", ("<x>",))):
        run = given(tmp_path, out=str(tmp_path / name), steps=2, known=("none",))
        fit(Run.from_dict({**run, "add_tokens": tokens}), progress=False)
    with pytest.raises(ConfigError, match="adapters must have the same new tokens"):
        adapted.open_all([str(tmp_path / "a"), str(tmp_path / "b")])


def test_tokens_come_from_the_manifest_without_a_tokenizer_and_must_have_the_ids_of_their_rows(tmp_path):
    fit(Run.from_dict(given(tmp_path, steps=2, known=("none",))), progress=False)
    adapter = tmp_path / "run" / "adapter"
    opened, _ = adapted.open_all([str(tmp_path / "run")])
    x = torch.tensor([opened.tokenizer.encode("the <call>cat")])
    y = logits(opened.model, x)
    swapped = AutoTokenizer.from_pretrained(tmp_path / "base")
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    again, _ = adapted.open_all([str(tmp_path / "run")])
    assert again.tokenizer.encode("the <call>cat") == x[0].tolist()
    assert torch.equal(logits(again.model, x), y)
    swapped.add_tokens(list(reversed(NEW)))
    swapped.save_pretrained(adapter)
    with pytest.raises(ConfigError, match=r"tokenizer must number the new tokens .*'<call>' has the id"):
        adapted.open_all([str(tmp_path / "run")])


def test_a_server_names_the_way_out(tmp_path):
    fit(Run.from_dict(given(tmp_path, steps=2, known=("none",))), progress=False)
    with pytest.raises(VeneerError, match="for a server export the merged model"):
        veneer.serve(str(tmp_path / "base"), {"a": str(tmp_path / "run")})
