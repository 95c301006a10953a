"""Tensors beside the targets, read one by one on a small net: changes, refusals, and the tensors they use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.peft.beside import ROWS, Beside
from veneer.adapt.peft.settings import PREFIX
from veneer.methods.base.biased import Biased
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.lora import LoRA
from veneer.sites import LeafSite, site_for

VOCABULARY, WIDTH = 7, 5
DRAW = torch.Generator().manual_seed(3)


class Net(nn.Module):
    """An embedding, a norm, and a head with or without a bias, tied or not."""

    def __init__(self, bias=True, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def numbers(*shape):
    return torch.randn(*shape, generator=DRAW)


def read(model, tensors, found=(), used=()):
    """Returns a reader of tensors, whose names lack PEFT's prefix, beside the changes found before."""
    whole = {f"{PREFIX}{k}": t for k, t in tensors.items()}
    return Beside(model, whole, list(found), {f"{PREFIX}{k}" for k in used})


def texts(reader):
    return [(p.kind, p.text) for p in reader.problems]


def lora(model, name, rank=2, alpha=6.0):
    """Returns a LoRA with scaling alpha / rank and its matrix in float64."""
    site = site_for(name, model.get_submodule(name))
    A, B = numbers(rank, site.in_), numbers(site.out, rank)
    return (site, LoRA.holding(site, A, B, alpha=alpha)), alpha / rank * B.double() @ A.double()


def other(model, name, method):
    site = site_for(name, model.get_submodule(name))
    return site, methods.build(methods.get(method), site, {"rank": 1})


@pytest.mark.parametrize("name", ["embed", "head"])
@pytest.mark.parametrize("tokens", [[1], [4, 0, 6]])
def test_rows_beside_a_lora_add_to_its_change(name, tokens):
    """W' - W is s B A, and at the tokens' rows the trained row minus the base's as well."""
    model = Net()
    change, D = lora(model, name)
    own, rows = model.get_submodule(name).weight.detach(), numbers(len(tokens), WIDTH)
    reader = read(model, {f"{name}.{ROWS}": rows}, [change])
    reader.rows({"trainable_token_indices": {name: tokens}})
    moved = torch.zeros(VOCABULARY, WIDTH).double()
    for token, row in zip(tokens, rows, strict=True):
        moved[token] = row.double() - own[token].double()
    ((site, delta),) = reader.changes
    torch.testing.assert_close(
        delta.delta(site).double(), D + (moved.mT if name == "embed" else moved), rtol=1e-5, atol=1e-5
    )
    assert not reader.problems and reader.used == {f"{PREFIX}{name}.{ROWS}"}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_an_embedding_are_one_tensor_at_both_ends_of_a_tied_model(tied):
    model = Net(tied=tied)
    rows = model.embed.weight.detach()[[0, 6]].clone()
    rows[1, 2] += 0.5  # a single number
    reader = read(model, {f"embed.{ROWS}": rows})
    reader.rows({"trainable_token_indices": [0, 6]})
    assert [s.name for s, _ in reader.changes] == ["embed", "head"][: 1 + tied]
    deltas = [d for _, d in reader.changes]
    assert all(isinstance(d, TokenRows) and d.D is deltas[0].D for d in deltas)
    wanted = torch.zeros(2, WIDTH)
    wanted[1, 2] = 0.5
    torch.testing.assert_close(deltas[0].D.detach(), wanted)


def test_rows_equal_to_the_base_are_no_change():
    model = Net()
    reader = read(model, {f"embed.{ROWS}": model.embed.weight.detach()[[3]]})
    reader.rows({"trainable_token_indices": [3]})
    assert not reader.changes and not reader.problems


@pytest.mark.parametrize(
    ("tokens", "shape"), [([0, VOCABULARY], (2, WIDTH)), ([0, 1], (2, WIDTH + 1)), ([0, 1], (3, WIDTH))]
)
def test_rows_that_do_not_fit_are_refused(tokens, shape):
    model = Net()
    reader = read(model, {f"embed.{ROWS}": torch.ones(shape)})
    reader.rows({"trainable_token_indices": {"embed": tokens}})
    ((kind, text),) = texts(reader)
    assert kind == "fit" and not reader.changes
    assert text.startswith(
        f"wrong shape: embed.{ROWS} is {shape} for 2 tokens, the model's rows are (7, 5); resize its"
    )


def test_rows_of_a_token_below_zero_are_refused():
    reader = read(Net(), {f"embed.{ROWS}": torch.ones(2, WIDTH)})
    reader.rows({"trainable_token_indices": {"embed": [3, -1]}})
    text = f"wrong token: embed.{ROWS} has rows of token -1; tokens are numbered from 0"
    assert texts(reader) == [("fit", text)] and not reader.changes


def test_a_bias_of_another_shape_is_refused_and_used():
    reader = read(Net(), {"head.bias": torch.zeros(3)})
    reader.biases({"bias": "all"})
    assert texts(reader) == [("fit", "wrong shape: head.bias is (3,), the model's is (7,)")]
    assert not reader.changes and reader.used == {f"{PREFIX}head.bias"}


@pytest.mark.parametrize("bias", ["none", None, "all"])
def test_biases_are_read_where_the_settings_say_so(bias):
    model = Net()
    t = model.head.bias.detach() + 2
    reader = read(model, {"head.base_layer.bias": t, "norm.bias": model.norm.bias.detach()})
    reader.biases({"bias": bias})
    if bias != "all":
        assert not reader.changes and not reader.used
        return
    ((site, delta),) = reader.changes  # the norm's is the base's own
    assert site.name == "head"
    torch.testing.assert_close(delta.delta(site)[:, 0].detach(), torch.full((7,), 2.0))
    assert reader.used == {f"{PREFIX}head.base_layer.bias", f"{PREFIX}norm.bias"}


def test_a_bias_joins_the_change_of_its_layer():
    model = Net()
    change, D = lora(model, "head")
    reader = read(model, {"head.bias": model.head.bias.detach() - 3}, [change])
    reader.biases({"bias": "lora_only"})
    ((site, delta),) = reader.changes
    assert isinstance(delta, Biased)
    torch.testing.assert_close(delta.b.detach(), torch.full((7,), -3.0))
    torch.testing.assert_close(delta.delta(site).double(), D, rtol=1e-5, atol=1e-5)


def test_a_bias_that_a_whole_module_took_is_not_read_again():
    model = Net()
    reader = read(model, {"head.bias": model.head.bias.detach() + 2}, used=["head.bias"])
    reader.biases({"bias": "all"})
    assert not reader.changes and not reader.problems


def test_a_bias_that_the_model_lacks_stays_unused():
    reader = read(Net(bias=False), {"head.bias": torch.ones(7)})
    reader.biases({"bias": "all"})
    assert not reader.changes and not reader.problems and not reader.used


def test_a_bias_of_the_branch_is_scaled_as_the_branch_is():
    model = Net()
    change, _ = lora(model, "head", rank=2, alpha=6.0)
    b = numbers(7)
    reader = read(model, {"head.lora_B.bias": b}, [change])
    reader.low_rank_biases({"lora_bias": True})
    torch.testing.assert_close(reader.changes[0][1].b.detach(), 3 * b)
    assert reader.used == {f"{PREFIX}head.lora_B.bias"}


def test_biases_of_the_branch_that_cannot_be_read_are_named():
    """A module kept whole has no branch."""
    model = Net()
    whole = LeafSite("norm", model.norm)
    found = [(whole, methods.build(methods.get("full"), whole, {})), other(model, "head", "dora")]
    reader = read(model, {"head.lora_B.bias": torch.ones(7)}, found)
    reader.low_rank_biases({"lora_bias": True})
    said = "head.lora_B.bias: a bias beside another method; merge the adapter in PEFT"
    assert texts(reader) == [("fit", said)] and reader.changes == found
    reader = read(model, {}, [lora(model, "head")[0], found[0]])
    reader.low_rank_biases({"lora_bias": True})
    assert texts(reader) == [("fit", "missing: head.lora_B.bias; merge the adapter in PEFT")]


def test_embeddings_in_the_file_are_read_whole_where_they_differ():
    """Copies that equal the base's are left to others, as are layers with a change of their own."""
    model = Net()
    head = {"head.weight": model.head.weight.detach() + 1, "head.bias": model.head.bias.detach()}
    embed = {"embed.weight": model.embed.weight.detach()}
    reader = read(model, {**embed, **head})
    reader.embeddings()
    ((site, delta),) = reader.changes
    assert site.name == "head" and reader.used == {f"{PREFIX}{k}" for k in head}
    wanted = torch.cat([torch.ones(VOCABULARY * WIDTH), torch.zeros(7)])
    torch.testing.assert_close(delta.D.detach().flatten(), wanted)
    for tensors, found, used in (
        ({"head.weight": head["head.weight"]}, [], []),
        (head, [], ["head.bias"]),
        (head, [lora(model, "head")[0]], []),
        ({**head, "head.weight": torch.ones(3, WIDTH)}, [], []),
    ):
        reader = read(model, tensors, found, used)
        reader.embeddings()
        assert reader.changes == found and reader.used == {f"{PREFIX}{k}" for k in used}
        assert not reader.problems


def test_embeddings_are_read_beside_an_attached_adapter():
    model = veneer.attach(Net(), "lora", to=["embed"], rank=1)
    reader = read(model, {"embed.weight": model.embed.weight.detach() + 1})
    reader.embeddings()
    assert [s.name for s, _ in reader.changes] == ["embed"] and not reader.problems
