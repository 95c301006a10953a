"""Sums of acting changes at one layer: their form, their strengths, and what they may write into."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt.acting import forward
from veneer.adapt.attached import changes, layers

METHODS = {
    "lora": {"rank": 2},
    "dora": {"rank": 3},
    "ia3": {},
    "hra": {"rank": 2},
    "bottleneck": {},
    "oft": {"block": 2},
    "fourierft": {},
}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(*methods, out=4, kind=nn.Linear):
    """A layer with an adapter of each method, called by its place in the order: a, b, ...

    Without a bias for (IA)3, which would multiply it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, out, bias="ia3" not in methods)).double().eval()
    for name, method in zip("abcd", methods, strict=False):
        veneer.attach(model, method, to=["0"], name=name, **METHODS[method])
        randomise(model, name, seed=ord(name), size=0.3)
    return model


def deltas(model):
    (found,) = layers(model)
    return found


@pytest.mark.parametrize("strength", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("methods", [["lora"], ["dora"], ["ia3"], ["hra"], ["oft"], ["dora", "ia3", "dora"]])
def test_a_sum_acts_as_the_weight_that_it_merges_into(methods, strength):
    """Beside a LoRA at another strength; biases are no part of what gains change."""
    model = layer("lora", *methods)
    wanted = {"a": 0.25, **dict.fromkeys("bcd"[: len(methods)], strength)}
    merged = copy.deepcopy(model)
    veneer.merge(merged, wanted, probe={})
    with veneer.using(model, wanted):
        torch.testing.assert_close(model(X), merged(X), rtol=1e-10, atol=1e-10)


def test_one_adapter_s_factors_are_not_copied():
    model = layer("lora")
    ((site, delta),) = changes(model, "a")
    found = forward.acting(deltas(model))
    assert found.excess is None and not found.others
    assert found.factors[0].data_ptr() == delta.normal_form(site).A.data_ptr()


def test_gains_alone_need_no_product(monkeypatch):
    model = layer("ia3")
    found = forward.acting(deltas(model))
    assert found.factors is None and found.excess is not None
    monkeypatch.setattr(forward, "project", lambda x, A: pytest.fail("a product of rank 0"))
    model(X)


class Own(nn.Linear):
    """A subclass, whose output another module may keep."""


def unchanged_forward(model):
    model[0].forward = model[0].forward


WRITES = {
    "alone": (["lora"], nn.Linear, None, True),
    "two of low rank": (["lora", "lora"], nn.Linear, None, True),
    "a subclass": (["lora"], Own, None, False),
    "a forward of its own": (["lora"], nn.Linear, unchanged_forward, False),
    "beside another form": (["lora", "bottleneck"], nn.Linear, None, False),
    "behind a gain": (["lora", "dora"], Own, None, True),
}


@pytest.mark.parametrize("case", WRITES)
def test_low_ranks_are_added_in_place_only_where_nobody_else_has_the_output(case, monkeypatch):
    methods, kind, change, wanted = WRITES[case]
    model = layer(*methods, kind=kind)
    veneer.activate(model, *"ab"[: len(methods)])
    if change is not None:
        change(model)
    real, seen = forward.expand, []

    def expand(y, h, B, *, writable):
        seen.append(writable)
        return real(y, h, B, writable=writable)

    monkeypatch.setattr(forward, "expand", expand)
    model(X)
    assert seen == [wanted]


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_that_was_there_before_keeps_the_base_s_output(everywhere):
    """On the layer, or on all modules."""
    plain = nn.Sequential(nn.Linear(6, 4)).double()
    model, kept = copy.deepcopy(plain), []

    def note(module, args, y):
        if module is model[0]:
            kept.append(y)

    register = nn.modules.module.register_module_forward_hook
    handle = register(note) if everywhere else model[0].register_forward_hook(note)
    veneer.attach(model, "lora", rank=2)
    randomise(model, size=0.3)
    with torch.no_grad():
        assert not torch.equal(model(X), plain(X))
    handle.remove()
    torch.testing.assert_close(kept[0], plain(X), rtol=0, atol=0)


def test_gradients_of_sums_are_those_of_the_merged_weight():
    """Nothing that the backward pass needs is written over."""
    model = layer("lora", "bottleneck", "hra", out=2).train()
    veneer.activate(model, "a", "b", {"c": 0.5})
    veneer.train_only(model, "a", "b", "c")
    x = X[:2].clone().requires_grad_()
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]

    def act(*_):
        return model(x)

    assert torch.autograd.gradcheck(act, inputs, fast_mode=True)


def test_changes_move_with_the_model_and_whole_numbers_stay_whole():
    model = nn.Sequential(nn.Linear(6, 4), nn.Embedding(9, 6))
    veneer.attach(model, "lora", rank=2)
    holder = layers(model)[0]
    holder["default"].register_buffer("ids", torch.arange(3))
    model.to(torch.bfloat16)
    assert holder["default"].A.dtype == torch.float32 and holder["default"].ids.dtype == torch.int64
    assert model[0].weight.dtype == torch.bfloat16
    model.to("meta").to_empty(device="cpu")
    assert holder["default"].A.device.type == "cpu" and holder["default"].ids.dtype == torch.int64
