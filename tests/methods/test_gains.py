"""The whole normal form, gains of inputs and outputs around a low-rank product, alone and beside other
changes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.gains import Gains
from support.models import llama, output, randomise
from support.table import SITES
from torch import nn

import veneer
from veneer.adapt import hooks
from veneer.adapt.acting.shared_inputs import discover, groups
from veneer.adapt.attached import changes
from veneer.adapt.combine import to_lora
from veneer.adapt.merge import merge
from veneer.methods import Factors
from veneer.sites import site_for

PARTS = ["ABgc", "ABc", "gc", "c", "ABg", "g"]


def made(place, parts, size=0.3):
    torch.manual_seed(0)
    base = nn.Sequential(SITES[place].layer().double())
    model = veneer.attach(copy.deepcopy(base), Gains, to=["0"], parts=parts)
    with torch.no_grad():
        for p in model[0].deltas.parameters():
            p.add_(size * torch.randn_like(p))
    return base, model, SITES[place].x()


def written(base, delta):
    """W' by the definition, one number at a time where it matters: W'[o, i] = g[o] (W[o, i] + sum_r B[o, r]
    A[r, i]) c[i]."""
    site = site_for("0", copy.deepcopy(base)[0])
    W = site.weight().detach() + (delta.B @ delta.A if "AB" in delta.parts else 0)
    for o in range(W.shape[0]):
        W[o] *= delta.g[o] if delta.g is not None else 1
    for i in range(W.shape[1]):
        W[:, i] *= delta.c[i] if delta.c is not None else 1
    site.set_weight(W)
    return nn.Sequential(site.module)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("place", SITES)
def test_the_form_and_its_dial_on_every_layer(place, parts):
    base, model, x = made(place, parts)
    exact = written(base, changes(model, "default")[0][1])(x)
    torch.testing.assert_close(model(x), exact, rtol=1e-10, atol=1e-10)
    for t in (0.0, 0.5, -1.0):
        with veneer.using(model, {"default": t}):
            torch.testing.assert_close(model(x), base(x) + t * (exact - base(x)), rtol=1e-10, atol=1e-10)
    assert merge(model).error < 1e-12
    torch.testing.assert_close(model(x), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", PARTS)
def test_beside_other_changes_it_is_the_sum_of_changes_of_the_weight(parts):
    base, model, x = made("linear", parts)
    alone = model(x)
    veneer.attach(model, "lora", to=["0"], rank=2, name="other")
    randomise(model, "other")
    with veneer.using(model, "other"):
        other = model(x)
    torch.testing.assert_close(model(x), alone + other - base(x), rtol=1e-10, atol=1e-10)
    with veneer.using(model, "default"):
        assert torch.equal(model(x), alone)
    y = model(x)
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)


def test_alone_it_multiplies_the_input_and_makes_no_matrix_of_the_bases_size(monkeypatch):
    _, model, x = made("linear", "ABgc")
    monkeypatch.setattr(Factors, "dense", lambda *a: pytest.fail("W' - W was made"))
    model(x)
    with pytest.raises(pytest.fail.Exception, match="W' - W was made"), veneer.using(model, {"default": 0.5}):
        model(x)


def test_gradients_copies_pickles_and_detaching():
    base, model, x = made("linear", "ABgc")
    y = model(x)
    parameters = {n: p for n, p in model.named_parameters() if "deltas" in n}

    def at(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        at, tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    )
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(again(x), y)
    torch._dynamo.reset()  # other tests fill the cache of these functions
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    veneer.detach(again)
    assert torch.equal(again(x), base(x)) and not again[0]._forward_pre_hooks


def test_one_hook_for_several_adapters_and_none_without_gains():
    model = veneer.attach(nn.Sequential(nn.Linear(4, 3)), Gains, parts="ABg")
    assert not model[0]._forward_pre_hooks
    veneer.attach(model, Gains, parts="c", name="one")
    veneer.attach(model, Gains, parts="c", name="two")
    assert list(model[0]._forward_pre_hooks.values()) == [hooks._scale_input]


def test_layers_that_share_a_product_are_not_misled_by_a_gain():
    model = veneer.attach(llama(), "lora", rank=2).train()
    randomise(model)
    with discover(model):
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    assert len(groups(model)) == 4
    veneer.attach(model, Gains, to=["k_proj"], name="gain")
    randomise(model, "gain")
    for names in (("gain",), ("default", "gain")):
        with veneer.using(model, *names):
            y = output(model)
            twin = copy.deepcopy(model)  # whose layers are in no group
            torch.testing.assert_close(y, output(twin))
        written_in = copy.deepcopy(model)
        for name in set(veneer.adapters(written_in)) - set(names):
            veneer.detach(written_in, name)
        merge(written_in, *names, probe={})
        torch.testing.assert_close(output(written_in), y, rtol=1e-4, atol=1e-4)


def test_a_gain_becomes_lora_by_the_svd_of_what_it_changes():
    _, model, x = made("linear", "gc")
    y = model(x)
    (cut,) = to_lora(model, "default", "low", rank=5)
    assert cut.error < 1e-12
    with veneer.using(model, "low"):
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
