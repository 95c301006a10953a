"""Rows of new tokens on small nets: growing, starting at the mean, refusals, and PEFT's own type for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.tokens import add, alone, known, words
from veneer.errors import ConfigError

ROWS, WIDTH = 6, 4


class Net(nn.Module):
    """An embedding and a head, tied or not, with or without a bias; both grow as in transformers."""

    def __init__(self, bias=True, tied=False, head=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=bias) if head else None
        if tied:
            self.head.weight = self.embed.weight
        self.asked = []

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def resize_token_embeddings(self, rows, mean_resizing=True):
        self.asked.append((rows, mean_resizing))
        tied = self.head is not None and self.head.weight is self.embed.weight
        for layer in (self.embed, self.head):
            for name, p in [] if layer is None else [*layer.named_parameters()]:
                more = p.new_full((rows - len(p), *p.shape[1:]), 9.0)
                setattr(layer, name, nn.Parameter(torch.cat([p.detach(), more])))
        if tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize(("tied", "bias", "head"), [(0, 1, 1), (0, 0, 1), (1, 1, 1), (0, 0, 0)])
def test_a_vocabulary_grows_by_zeros(tied, bias, head):
    model, plain = (Net(bias, tied, head) for _ in range(2))
    assert add.resize_vocabulary(model, ROWS + 2) is model
    assert model.asked == [(ROWS + 2, False)]
    parts = [(model.embed.weight, plain.embed.weight)]
    parts += [(model.head.weight, plain.head.weight)] if head else []
    parts += [(model.head.bias, plain.head.bias)] if bias and head else []
    for p, before in parts:
        assert len(p) == ROWS + 2 and torch.equal(p[:ROWS], before) and not p[ROWS:].any()
    for rows in (ROWS + 2, 3):
        assert add.resize_vocabulary(model, rows) is model and len(model.asked) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_at_the_mean_of_the_others_and_train_alone(tied):
    model = veneer.attach(Net(tied=tied), "lora", to=["inner"], rank=1)
    plain = Net(tied=tied)
    model.train()
    add.train_rows(model, {"<b>": 7, "<a>": 2})
    found = {s.name: d for s, d in changes(model, "default") if s.name != "inner"}
    assert [*found] == ["embed", "head"] and (found["embed"].D is found["head"].D) == tied
    assert model.asked == [(8, False)]
    for name, delta in found.items():
        W = torch.cat([plain.get_submodule(name).weight.detach(), torch.zeros(2, WIDTH)])
        mean = W[[0, 1, 3, 4, 5, 6]].mean(0)
        torch.testing.assert_close(delta.D.detach(), mean - W[[7, 2]])
        assert delta.tokens == [7, 2] and delta.options["words"] == ["<b>", "<a>"]
    assert all(p.requires_grad == ("deltas" in n) for n, p in model.named_parameters())


def test_models_that_cannot_train_rows_are_refused_unchanged():
    model = veneer.attach(Net(), "lora", to=["inner", "head"], rank=1)
    with pytest.raises(ConfigError, match=r"add_tokens: head must have no adapter, got one; leave them out"):
        add.train_rows(model, {"<a>": 6})
    with pytest.raises(ConfigError, match="name must be an attached adapter, got 'fr'"):
        add.train_rows(model, {"<a>": 6}, "fr")
    assert not model.asked
    blind = veneer.attach(nn.Sequential(nn.Linear(3, 3)), "lora", rank=1)
    with pytest.raises(ConfigError, match="model must have an embedding of tokens, got a Sequential"):
        add.train_rows(blind, {"<a>": 6})


class Bytes:
    """A tokenizer whose vocabulary is a table."""

    def __init__(self, *tokens):
        self.table = {t: i for i, t in enumerate(tokens)}

    def get_vocab(self):
        return dict(self.table)

    def add_tokens(self, tokens):
        for t in tokens:
            self.table.setdefault(t, len(self.table))

    def encode(self, text, add_special_tokens=True):
        return [self.table[text]] if not add_special_tokens else [0, self.table[text]]


def test_tokens_are_entered_whole_or_not_at_all():
    tokenizer = Bytes("<s>", "a")
    assert words.enter(tokenizer, ["<x>", "<y>"]) == {"<x>": 2, "<y>": 3} and len(tokenizer.table) == 4
    with pytest.raises(ConfigError) as e:
        words.enter(tokenizer, ["<z>", "<x>", " ", "", "<z>", "<x>"])
    assert str(e.value).splitlines() == [
        "add_tokens: tokens must not be empty, got ' '; leave it out",
        "add_tokens: tokens must differ, got '<z>' 2 times",
        "add_tokens: tokens must differ, got '<x>' 2 times",
        "add_tokens: tokens must be new, got '<x>', which has the id 2; leave it out",
    ]
    with pytest.raises(ConfigError, match="tokens must hold at least one token, got none"):
        words.enter(tokenizer, [])
    assert len(tokenizer.table) == 4


def test_new_tokens_that_a_model_lacks_are_named():
    record = {"sites": {"a": {"options": {}}, "b": {"options": {"words": ["<x>", "<y>"], "tokens": [4, 6]}}}}
    assert known.new_tokens(record) == {"<x>": 4, "<y>": 6} and known.new_tokens(None) == {}
    (text,) = known.missing(Net(), record)
    assert text.startswith("the adapter has the new tokens <x>, <y>, for which the model lacks rows (6 of 7)")
    assert "veneer.resize_vocabulary(model, 7)" in text
    assert known.missing(add.resize_vocabulary(Net(), 7), record) == []
    assert known.missing(nn.Linear(2, 2), record) == known.missing(Net(), None) == []


# PEFT's type of rows alone


def read(model, given, **settings):
    tensors = {f"{PREFIX}{n}.{alone.END}": t for n, t in given.items()}
    return alone.to_changes(model, {"peft_type": alone.TYPE, "token_indices": [4, 1], **settings}, tensors)


@pytest.mark.parametrize("named", [{}, {"target_modules": None}, {"target_modules": ["embed"]}])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_alone_are_those_of_the_embedding(tied, named):
    model = Net(tied=tied)
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    found, problems = read(model, {"embed": rows, **({"head.base_layer": rows} if tied else {})}, **named)
    assert [s.name for s, _ in found] == ["embed", "head"][: 1 + tied] and not problems
    for site, delta in found:
        torch.testing.assert_close(delta.rows(site), rows)


def test_rows_alone_that_fit_nothing_are_named():
    rows = torch.ones(2, WIDTH)
    found, problems = read(Net(), {"embed": rows}, target_modules=["odd"])
    assert not found and [tuple(p) for p in problems] == [
        ("fit", "no layer of the model matches target_modules=['odd']"),
        ("unused", f"1 tensors belong to no layer: embed.{alone.END} (2, 4)"),
    ]
    _, problems = read(Net(), {"embed": rows, "head": rows})  # of another weight
    assert [p.text for p in problems] == [f"1 tensors belong to no layer: head.{alone.END} (2, 4)"]
    _, problems = read(Net(tied=True), {"embed": rows, "head": rows + 1})
    ((kind, text),) = problems
    assert kind == "fit" and text.endswith(
        " share a weight, and the file holds different rows for them; untie the model first"
    )
    _, problems = read(Net(tied=True), {"head": rows})
    assert [p.text for p in problems] == [f"missing: embed.{alone.ROWS} (2, ..)"]
