"""Rows of a bank: ids of any shape, outputs that are written or not, and what is kept between layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.gains import Gains
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.banks.rows import Router
from veneer.errors import ConfigError, NotMergeable, ShapeError

METHODS = {
    "low": ("lora", {"rank": 2}),
    "dora": ("dora", {"rank": 3}),
    "many": ("flora", {"rank": 2}),
    "all": (Gains, {}),
    "gains": (Gains, {"parts": "gc"}),
}


def adapted(*names):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    for i, name in enumerate(names):
        method, options = METHODS[name]
        veneer.attach(model, method, to=["0"], name=name, **options)
        randomise(model, name, seed=i, size=0.3)
    return model


def alone(model, name, x):
    with veneer.using(model, *([name] if name else [])), torch.no_grad():
        return model(x)


SETS = [["low"], ["low", "dora"], ["low", "many"], ["dora", "many", "all"], ["gains", "low"], ["gains"]]


@pytest.mark.parametrize("names", SETS)
@pytest.mark.parametrize(
    ("ids", "shape"),
    [((3,), (3,)), ((3,), (3, 2)), ((3, 2), (3, 2)), ((3, 2), (3, 2, 2)), ((1,), (1, 2)), ((), (2, 3))],
)
@pytest.mark.parametrize("graded", [False, True])
def test_every_row_or_token_is_as_if_its_adapter_were_alone(names, ids, shape, graded):
    model = adapted(*names)
    x = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    known = [None, *names]
    each = [alone(model, n, x) for n in known]
    rows = veneer.bank(model, names)
    draw = torch.Generator().manual_seed(3)
    for _ in range(4):
        chosen = torch.randint(0, len(known), ids, generator=draw)
        rows.router.ids = chosen
        wanted = torch.zeros_like(each[0])
        for k, y in enumerate(each):
            here = (chosen == k).view(*ids, *(1,) * (x.ndim - len(ids)))
            wanted = torch.where(here, y, wanted)
        with torch.set_grad_enabled(graded):
            found = model(x)
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ids", "shape"), [((2,), (3, 6)), ((2, 3), (2, 6)), ((6,), (6,)), ((2, 6), (2, 6))])
def test_ids_that_are_no_rows_of_the_input_are_refused(ids, shape):
    model = adapted("low")
    rows = veneer.bank(model, ["low"])
    rows.router.ids = torch.zeros(ids, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"the bank has ids of shape .* and '0' was called with"):
        model(torch.zeros(shape).double())


@pytest.mark.parametrize("names", [["low"], ["low", "dora"], ["low", "many"]])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_beside_other_changes_a_bank_adds_its_sum(names, strength):
    model = adapted(*names)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    base, own = alone(model, None, x), [alone(model, n, x) for n in names]
    rows = veneer.bank(model, names)
    veneer.attach(model, "lora", rank=2, name="other")
    randomise(model, "other", seed=9, size=0.3)
    more = alone(model, "other", x) - base
    rows.use([names[0], None, names[-1]])
    wanted = base + more
    wanted[0] += strength * (own[0] - base)[0]
    wanted[2] += strength * (own[-1] - base)[2]
    with veneer.using(model, {"bank": strength}, "other"), torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)


def test_gains_of_inputs_act_alone():
    model = adapted("all")
    veneer.bank(model, ["all"]).use("all")
    veneer.attach(model, "lora", rank=2, name="other")
    x = torch.zeros(2, 6).double()
    with veneer.using(model, "bank", "other"), pytest.raises(ConfigError, match="gains of inputs at '0'"):
        model(x)
    ((site, delta),) = changes(model, "bank")
    with pytest.raises(NotMergeable, match="a bank holds many adapters"):
        delta.delta(site)


@pytest.mark.parametrize("names", [["low"], ["dora"], ["many"], ["gains"]])
def test_outputs_are_written_only_where_they_may_be(names):
    model = adapted(*names)
    rows = veneer.bank(model, names)
    rows.use([names[0]] * 4)
    ((site, layer),) = changes(model, "bank")
    x = torch.randn(4, 3, 6).double()
    plain = nn.functional.linear(x, model[0].weight, model[0].bias).detach()
    with torch.no_grad():
        wanted = layer.onto(x, plain.clone(), site, writable=False)
    for kept in (plain.clone(), plain.mT.contiguous().mT):
        if names != ["gains"]:
            with torch.no_grad():
                torch.testing.assert_close(kept + layer(x, kept, site), wanted, rtol=1e-12, atol=1e-12)
        for writable, graded in ((False, False), (True, True), (True, False)):
            y = kept.clone(memory_format=torch.preserve_format)
            with torch.set_grad_enabled(graded):
                found = layer.onto(x, y, site, writable=writable)
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)
            written = not torch.equal(y, kept)
            assert written == (names == ["low"] and writable and not graded and y.is_contiguous())


def test_a_router_notes_broken_slots_and_keeps_its_layouts():
    router = Router(["base", "a", "b"], torch.device("cpu"))
    assert router.finite and router.ids.shape == () and not router.state_dict()
    for slot, finite, whole in ((1, False, False), (2, False, False), (1, True, False), (2, True, True)):
        router.mark(slot, finite)
        assert router.finite is whole
    router.ids = torch.tensor([[0, 1], [1, 2]])
    first, spread = router.layout(), router.stretches()
    assert first is router.layout() and spread is router.stretches()
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert twin.held is None and twin.spread is None and twin.names == router.names
    router.ids[0, 0] = 2
    assert router.layout() is not first and router.stretches() is not spread
    assert router.stretches() != spread


@pytest.mark.parametrize(
    ("ids", "tokens", "wanted"),
    [
        (2, 3, [(2, None)]),
        ([1], 3, [(1, None)]),
        ([1, 1], 4, [(1, None)]),
        ([2, 0], 4, [(0, [2, 3]), (2, [0, 1])]),
        ([1, 0, 1], 3, [(0, [1]), (1, [0, 2])]),
        ([[0, 1], [1, 0]], 4, [(0, [0, 3]), (1, [1, 2])]),
    ],
)
def test_tokens_are_grouped_by_the_adapter_of_their_row(ids, tokens, wanted):
    model = adapted("low", "dora")
    (layer,) = veneer.bank(model, ["low", "dora"]).layers.values()
    layer.router.ids = torch.tensor(ids)
    found = [(k, None if index is None else index.tolist()) for k, index in layer.groups(tokens)]
    assert found == wanted
    if len(wanted) > 1:
        with pytest.raises(ShapeError, match="fused experts were called with 7 tokens"):
            layer.groups(7)
    assert layer.of_group(0, torch.float64) is None
    A, B, excess = layer.of_group(1, torch.float64)
    assert A.shape == (3, 6) and B.shape == (5, 3) and excess.shape == (5,) and not excess.any()


def test_ids_of_inference_have_no_versions():
    model = adapted("low")
    rows = veneer.bank(model, ["low"])
    (layer,) = rows.layers.values()
    before = layer.state()
    rows.router.ids.add_(1)
    assert layer.state() != before
    with torch.inference_mode():
        rows.router.ids = torch.tensor([0, 1])
        assert layer.state() == (id(rows.router.ids), -1)
