"""Adapters that share a layer draw apart; padding rows take no gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from support import models
from torch import nn

import veneer
from veneer.adapt.attached import changes

DRAWN = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "loha": {"rank": 2},
    "flora": {"rank": 3},
    "bottleneck": {"rank": 2},
    "prefix": {"length": 3},
}


def state(model, name):
    return {f"{s.name}.{k}": t for s, d in changes(model, name) for k, t in d.state_dict().items()}


@pytest.mark.parametrize("method", DRAWN)
def test_adapters_of_one_layer_draw_different_starts(method):
    model = models.llama()
    for name in ("a", "b"):
        veneer.attach(model, method, name=name, **DRAWN[method])
    for (site, one), (_, two) in zip(changes(model, "a"), changes(model, "b"), strict=True):
        pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
        assert not all(torch.equal(s, t) for s, t in pairs), site.name


@pytest.mark.parametrize("method", DRAWN)
def test_a_name_and_a_seed_give_one_start(method):
    def started(name, seed):
        model = veneer.attach(models.llama(), method, name=name, seed=seed, **DRAWN[method])
        return state(model, name)

    one = started("a", 3)
    assert all(torch.equal(t, one[n]) for n, t in started("a", 3).items())
    assert not all(torch.equal(t, one[n]) for n, t in started("a", 4).items())
    assert not all(torch.equal(t, one[n]) for n, t in started("b", 3).items())


def test_the_start_of_the_default_adapter_is_the_one_of_earlier_versions():
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Linear(4, 3)), "lora", to=["0"], rank=1)
    from veneer.methods.inits import Start, get
    from veneer.ops.draws import keyed

    given = Start(model[0].weight.detach(), 1, 2.0, keyed(0, "0"))
    assert torch.equal(changes(model, "default")[0][1].A.detach(), get("kaiming").start(given)[0])


def test_a_stack_of_leading_parts_draws_as_each_layer_alone():
    model = models.llama()
    veneer.attach(model, "lora", name="x", rank=2, init="pissa")
    alone = veneer.attach(models.llama(), "lora", name="x", rank=2, init="pissa", to=["v_proj"])
    both = state(model, "x")
    for n, t in state(alone, "x").items():
        torch.testing.assert_close(t.abs(), both[n].abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "fourierft", "miss", "full"])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_padding_row_of_an_embedding_learns_nothing(method, padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=padding)).double()
    with torch.no_grad():
        model[0].weight[padding] = 0.3
    options = {"fourierft": {"frequencies": 20}, "full": {}}.get(method, {"rank": 2})
    veneer.attach(model, method, to=["0"], **options)
    models.randomise(model)
    x = torch.tensor([[0, 1, 2, 5]])
    every = copy.deepcopy(model)
    every[0].padding_idx = None
    for m in (model, every):
        m.zero_grad()
        (m(x) * torch.linspace(-1, 1, 32).view(1, 4, 8).double()).sum().backward()
    assert torch.equal(model(x), every(x))
    for (n, p), q in zip(model.named_parameters(), every.parameters(), strict=True):
        if p.requires_grad and method in ("lora", "dora") and n.endswith(".A"):
            assert not p.grad[:, padding].any() and q.grad[:, padding].any()
            others = [i for i in range(10) if i != padding]
            torch.testing.assert_close(p.grad[:, others], q.grad[:, others])
    if method == "full":
        grad = dict(model.named_parameters())["0.deltas.default.D"].grad.view(10, 8)
        assert not grad[padding].any() and grad[1].any()


def test_a_change_of_the_padding_token_does_not_reach_the_gradient():
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Embedding(10, 8, padding_idx=0)), "lora", to=["0"], rank=4)
    model(torch.tensor([[0, 0, 0]])).square().sum().backward()
    ((_, delta),) = changes(model, "default")
    assert not delta.A.grad.any()
