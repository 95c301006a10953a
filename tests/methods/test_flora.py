"""FLoRA beyond the table: few rows and many, ranks that stay apart, and its way to a file and back."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import llama, output, randomise
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.errors import ShapeError
from veneer.methods.flora import FEW_ROWS, FLoRA
from veneer.optim.base.groups import adamw, of_adapter, set_rates
from veneer.sites import site_for


def made(rank, *, bias=True):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5, bias=bias).double())
    model = veneer.attach(copy.deepcopy(base), "flora", rank=rank)
    randomise(model, size=0.3)
    return base, model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_few_rows_and_many_give_the_same(rank, bias):
    _, model = made(rank, bias=bias)
    x = torch.randn(2 * FEW_ROWS, 7, dtype=torch.float64)
    apart = torch.cat([model(part) for part in x.split(FEW_ROWS // 2)])
    torch.testing.assert_close(model(x), apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x[:0]), x.new_zeros(0, 5))


def test_few_rows_make_no_matrix_of_the_weights_size(monkeypatch):
    for rank in (1, 3):
        _, model = made(rank)
        monkeypatch.setattr(FLoRA, "delta", lambda *a: pytest.fail("W' - W was made"))
        model(torch.randn(FEW_ROWS, 7, dtype=torch.float64))


def trained(delta, model, steps=50):
    """delta's B after steps of Adam on a random goal."""
    torch.manual_seed(1)
    x, goal = torch.randn(32, 7, dtype=torch.float64), torch.randn(32, 5, dtype=torch.float64)
    adam = torch.optim.Adam(delta.parameters(), lr=1e-2)
    for _ in range(steps):
        adam.zero_grad()
        (model(x) - goal).square().mean().backward()
        adam.step()
    return delta.B.detach()


def test_ranks_learn_apart_which_they_never_do_from_ones():
    model = veneer.attach(nn.Sequential(nn.Linear(7, 5)).double(), "flora", rank=3)
    delta = changes(model, "default")[0][1]
    twin = copy.deepcopy(model)
    ones = changes(twin, "default")[0][1]
    nn.init.ones_(ones.A)
    nn.init.constant_(ones.B, 1 / 3)
    assert torch.linalg.matrix_rank(trained(delta, model), rtol=1e-6) == 3
    assert torch.linalg.matrix_rank(trained(ones, twin), rtol=1e-6) == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_it_is_saved_and_loaded(rank, tmp_path):
    model = veneer.attach(llama(), "flora", rank=rank, to=["q_proj", "down_proj"])
    randomise(model)
    y = output(model)
    veneer.save(model, tmp_path / "flora")
    assert torch.equal(output(veneer.load(llama(), tmp_path / "flora")), y)


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Conv1D(5, 7)])
@pytest.mark.parametrize("trainable", [False, True])
def test_every_row_has_its_own_of_any_rank(layer, trainable):
    model = nn.Sequential(copy.deepcopy(layer).double())
    for rank in (1, 2, 3):
        veneer.attach(model, "flora", rank=rank, name=f"of-{rank}")
        randomise(model, f"of-{rank}", seed=rank, size=0.4)
    x = torch.randn(6, 4, 7, dtype=torch.float64)
    veneer.train_only(model, "of-1", "of-2", "of-3")
    rows = ["of-3", "of-1", None, "of-2", "of-3", "of-2"]
    expected = []
    for name, own in zip(rows, x, strict=True):
        W = (layer.weight.mT if isinstance(layer, Conv1D) else layer.weight).detach().double()
        if name:
            _, delta = changes(model, name)[0]
            W = W * (delta.B @ delta.A)
        expected.append(nn.functional.linear(own, W, None if layer.bias is None else layer.bias.double()))
    expected = torch.stack(expected)
    veneer.bank(model, ["of-1", "of-2", "of-3"], trainable=trainable).use(rows)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), expected, rtol=1e-12, atol=1e-12
        )  # in another way, which writes in place
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, rtol=1e-12, atol=1e-12)
    if trainable:
        own = [p for n in ("of-1", "of-2", "of-3") for _, d in changes(model, n) for p in d.parameters()]
        for a, b in zip(
            *(torch.autograd.grad(y.sin().sum(), own) for y in (model(x), expected)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_spoiled_one_spoils_its_own_rows_alone_and_its_slot_can_be_used_again():
    model = nn.Sequential(nn.Linear(7, 5).double())
    for name, rank in (("good", 2), ("bad", 3), ("low", 1)):
        veneer.attach(model, "flora", rank=rank, name=name)
        randomise(model, name, size=0.4)
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    bank = veneer.bank(model, ["good", "low"], slots=3, products=3).use(["good", None, "low"])
    expected = model(x)
    with torch.no_grad():
        changes(model, "bad")[0][1].A.fill_(float("nan"))
    bank.write("bad")
    assert torch.equal(model(x), expected)
    bank.use(["good", "bad", "low"])
    y = model(x)
    assert torch.equal(y[[0, 2]], expected[[0, 2]]) and y[1].isnan().all()
    bank.use([None, None, None]).evict("bad")
    bank.use(["good", None, "low"])
    assert torch.equal(model(x), expected)


def test_a_rank_of_none_is_refused():
    with pytest.raises(ShapeError, match="rank must be >= 1, got 0 at '0'"):
        veneer.attach(nn.Sequential(nn.Linear(3, 2)), "flora", rank=0)


def test_weight_decay_does_not_shrink_the_weights_themselves():
    model = veneer.attach(nn.Sequential(nn.Linear(3, 2)), "flora", rank=2)
    adam = adamw(of_adapter(model, "default"), {})
    set_rates(adam, rate=0.1, decay=0.5)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.0]


@pytest.mark.parametrize(("name", "dropout"), [("hira", {"dropout": 0.5}), ("hira", {}), ("flora", {})])
def test_products_with_the_weight_are_of_rows_alone(name, dropout):
    """A bank applies them to rows; a convolution or an embedding has others."""
    for layer in (nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Embedding(8, 8)):
        site = site_for("0", layer)
        delta = methods.build(methods.get(name), site, {"rank": 2, **dropout})
        assert (delta.eval().products(site) is None) == (not isinstance(layer, nn.Linear))
        assert (delta.train().products(site) is None) == (not isinstance(layer, nn.Linear) or bool(dropout))


@pytest.mark.parametrize(
    "shape", [(FEW_ROWS,), (2, FEW_ROWS // 2), (FEW_ROWS // 2, 2), (1, 2, FEW_ROWS // 2)]
)
def test_the_dense_change_is_made_for_more_than_few_rows(shape, monkeypatch):
    _, model = made(2)

    def dense(*_):
        raise AssertionError("W' - W was made")

    monkeypatch.setattr(FLoRA, "delta", dense)
    model(torch.randn(*shape, 7).double())
    with pytest.raises(AssertionError, match="W' - W was made"):
        model(torch.randn(*shape[:-1], shape[-1] + 1, 7).double())


@pytest.mark.parametrize("rank", [1, 2])
def test_rank_one_is_gains_and_further_ranks_are_products(rank):
    site = site_for("0", nn.Linear(7, 5).double())
    delta = methods.build(methods.get("flora"), site, {"rank": rank})
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randn(p.shape))
    assert (delta.factors(site) is None) == (rank > 1)
    assert (delta.products(site) is None) == (rank == 1)
    if rank == 1:
        form = delta.factors(site)
        assert form.A.shape == (0, 7) and form.B.shape == (5, 0)
        assert form.g.tolist() == delta.B[:, 0].tolist() and form.c.tolist() == delta.A[0].tolist()
        torch.testing.assert_close(form.dense(site), delta.delta(site))
