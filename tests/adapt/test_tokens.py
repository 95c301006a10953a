"""New tokens: only their rows change, on tied and untied models; PEFT and the merged model agree."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models, tiny

import veneer
from veneer.adapt.attached import base_parameters
from veneer.adapt.probe_inputs import default_inputs
from veneer.errors import ConfigError, FormatError

NEW = ["<call>", "</call>", "<end>"]


def begun(tied):
    """Returns a model, its tokenizer and the number of its rows."""
    tokenizer = copy.deepcopy(tiny.tokenizer())  # which tests share
    model = models.llama(vocab_size=len(tokenizer), tie_word_embeddings=tied, initializer_range=0.2)
    return model, tokenizer, len(tokenizer)


def trained(tied):
    """Returns a model after steps on texts with new tokens, its tokenizer, the new ids and some inputs."""
    model, tokenizer, rows = begun(tied)
    veneer.attach(model, "lora", rank=2)
    ids = veneer.add_tokens(model, tokenizer, NEW)
    x = torch.randint(3, rows, (2, 12), generator=torch.Generator().manual_seed(1))
    x[:, ::3] = torch.tensor([*ids.values(), rows])[:4]
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(5):
        adam.zero_grad()
        model(x, labels=x).loss.backward()
        adam.step()
    return model.eval(), tokenizer, ids, x


def logits(model, x):
    with torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_new_rows_change_and_all_programs_agree(tied, tmp_path):
    model, tokenizer, ids, x = trained(tied)
    plain, _, rows = begun(tied)
    y = logits(model, x)
    base = dict(plain.named_parameters())
    for n, p in base_parameters(model).items():  # the base itself is untouched
        assert torch.equal(p[: len(base[n])], base[n]) and not p[len(base[n]) :].any()
    veneer.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config["trainable_token_indices"]) == (
        {"model.embed_tokens"} | ({"lm_head"} - {"lm_head" * tied})
    )

    read = veneer.resize_vocabulary(begun(tied)[0], len(tokenizer))
    veneer.load(read, tmp_path / "a")
    torch.testing.assert_close(logits(read, x), y, rtol=1e-5, atol=1e-5)
    veneer.save(read, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == config
    needed = rf"new tokens <call>, .*\({rows} of {len(tokenizer)}\); call .*\(model, {len(tokenizer)}\) first"
    with pytest.raises(FormatError, match=needed):
        veneer.load(begun(tied)[0], tmp_path / "a")

    other = begun(tied)[0]
    other.resize_token_embeddings(len(tokenizer))  # with rows of its own, which the adapter's replace
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs, x), y, rtol=1e-5, atol=1e-5)

    veneer.merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-5, atol=1e-5)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied and model.config.tie_word_embeddings == tied
    assert torch.equal(embedding[:rows], plain.get_input_embeddings().weight)
    assert torch.equal(head[:rows], plain.get_output_embeddings().weight)
    assert embedding[list(ids.values())].any(dim=1).all()
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(logits(opened, x), y, rtol=1e-5, atol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert again.convert_tokens_to_ids(NEW) == list(ids.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_strength_lies_between_the_rows(tied):
    model, _, _, x = trained(tied)
    with veneer.using(model, {"default": 0.5}):
        half = logits(model, x)
    veneer.merge(model, {"default": 0.5})
    torch.testing.assert_close(logits(model, x), half, rtol=1e-5, atol=1e-5)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_rows_of_a_padded_vocabulary_are_used_before_it_grows():
    model, tokenizer, rows = begun(False)
    model.resize_token_embeddings(rows + 8)
    veneer.attach(model, "lora", rank=2)
    ids = veneer.add_tokens(model, tokenizer, NEW)
    assert list(ids.values()) == [rows, rows + 1, rows + 2]
    assert len(model.get_input_embeddings().weight) == rows + 8


def test_what_is_wrong_is_named_and_nothing_is_changed():
    model, tokenizer, rows = begun(True)
    known = next(iter(tokenizer.get_vocab()))
    with pytest.raises(ConfigError) as e:
        veneer.add_tokens(model, tokenizer, [known, "<call>", "<call>"])
    text = str(e.value)
    assert f"tokens must be new, got {known!r}, which has the id" in text
    assert "tokens must differ, got '<call>' 2 times" in text
    assert "name must be an attached adapter, got 'default'" in text
    assert len(tokenizer) == rows == len(model.get_input_embeddings().weight)


class Fixed:
    """A tokenizer of single bytes whose vocabulary is fixed."""

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def add_tokens(self, tokens):
        raise NotImplementedError("bytes are all there is")


class Deaf(Fixed):
    """Takes new tokens, and goes on to read them byte by byte."""

    def __init__(self):
        self.added = {}

    def get_vocab(self):
        return super().get_vocab() | self.added

    def add_tokens(self, tokens):
        self.added |= {t: 128 + i for i, t in enumerate(tokens)}


def test_a_tokenizer_that_cannot_grow_is_refused_and_unchanged():
    model, _, rows = begun(True)
    veneer.attach(model, "lora", rank=2)
    with pytest.raises(ConfigError, match=r"got a Fixed, which refuses \(NotImpl.*bytes are all there is"):
        veneer.add_tokens(model, Fixed(), NEW)
    deaf = Deaf()
    with pytest.raises(ConfigError, match=r"tokenizer must read '<call>' as one token, and a Deaf does not"):
        veneer.add_tokens(model, deaf, NEW)
    assert not deaf.added and len(model.get_input_embeddings().weight) == rows
    with pytest.raises(ConfigError, match=r"tokens must not be empty, got ''; leave it out"):
        veneer.add_tokens(model, Fixed(), [""])


# PEFT itself fails on a tied model whose head is named too.
TARGETS = [(True, None), (False, None), (False, ["embed_tokens", "lm_head"])]


@pytest.mark.parametrize("tied, targets", TARGETS)
def test_rows_alone_go_to_peft_and_come_from_it(tied, targets, tmp_path):
    torch.manual_seed(2)
    config = peft.TrainableTokensConfig(
        token_indices=[7, 1, 5], target_modules=targets, task_type="CAUSAL_LM", init_weights=True
    )
    theirs = peft.get_peft_model(begun(tied)[0], config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.tensor([[1, 2, 3, 5, 7, 1]])
    wanted, plain = logits(theirs, x), begun(tied)[0]
    assert (wanted - logits(plain, x)).abs().max() > 0.1

    model = veneer.load(begun(tied)[0], tmp_path / "theirs")
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-5, atol=1e-5)
    veneer.save(model, tmp_path / "ours")
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "TRAINABLE_TOKENS" and settings["token_indices"] == [7, 1, 5]
    again = peft.PeftModel.from_pretrained(begun(tied)[0], tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, x), wanted, rtol=1e-5, atol=1e-5)
    again = veneer.load(begun(tied)[0], tmp_path / "ours")
    torch.testing.assert_close(logits(again, x), wanted, rtol=1e-5, atol=1e-5)

    veneer.merge(model)
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-5, atol=1e-5)
    own, base = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
    kept = [i for i in range(len(own)) if i not in (1, 5, 7)]
    assert torch.equal(own[kept], base[kept]) and not torch.equal(own[[1, 5, 7]], base[[1, 5, 7]])


def test_rows_of_tokens_that_the_probe_lacks_are_no_idle_adapter(tmp_path):
    model = begun(False)[0]
    seen = default_inputs(model)["input_ids"]
    rare = [i for i in range(len(model.get_input_embeddings().weight)) if i not in seen][:3]
    config = peft.TrainableTokensConfig(token_indices=rare, target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(model, config).eval()
    for p in theirs.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    x = torch.tensor([[1, *rare]])
    wanted = logits(theirs, x)
    torch.testing.assert_close(
        logits(veneer.load(begun(False)[0], tmp_path), x), wanted, rtol=1e-5, atol=1e-5
    )


def test_rows_alone_that_do_not_fit_are_named(tmp_path):
    config = peft.TrainableTokensConfig(token_indices=[1, 5], task_type="CAUSAL_LM")
    peft.get_peft_model(begun(True)[0], config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    rows = load_file(file)
    name = "base_model.model.lm_head.trainable_tokens_delta"
    save_file({**rows, name: rows[name] + 1, name.replace("lm_head", "odd"): rows[name].clone()}, file)
    with pytest.raises(FormatError) as e:
        veneer.load(begun(True)[0], tmp_path)
    assert "share a weight, and the file holds different rows for them" in str(e.value)
    assert "1 tensors belong to no layer: odd.trainable_tokens_delta (2, 32)" in str(e.value)
    save_file({k: t[:1].clone() for k, t in rows.items()}, file)
    with pytest.raises(FormatError, match=r"wrong shape: .* is \(1, 32\) for 2 tokens"):
        veneer.load(begun(True)[0], tmp_path)
