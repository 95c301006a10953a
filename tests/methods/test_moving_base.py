"""Every method follows a base that moves under it: trained beside it, loaded or written over."""

from __future__ import annotations

import copy

import pytest
import torch
from support.cells import attach, fitted, numpy_tensors, shake
from support.table import METHODS, SITES
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.methods import dora
from veneer.sites import site_for

PLACES = ["linear", "Conv1D", "embedding", "conv2d"]
# Starts computed from W are kept with the adapter: the change stays the one of the W it was attached to.
KEPT = {"pissa", "pissa alpha", "olora", "loldu", "loldu svd", "loraxs"}
CELLS = [(m, s) for m in METHODS for s in PLACES]


def adapted(method, site, seed=0):
    """A plain base, the same base with a method away from its start, and an input."""
    torch.manual_seed(seed)
    place = SITES[site]
    base = nn.Sequential(place.layer().double())
    row = fitted(METHODS[method], base[0])
    x = place.x()
    model = copy.deepcopy(base)
    attach(model, row, x)
    shake(model)
    return model, x


def expected(model, x, method, first):
    """The layer with the oracle's W' for the W that is there now. first: W when the adapter was attached."""
    ((site, delta),) = changes(model, "default")
    row, now = fitted(METHODS[method], model[0]), site.weight().detach().numpy()
    then = first if method in KEPT else now
    W = now - then + row.oracle(then, numpy_tensors(delta), row.options)
    plain = copy.deepcopy(model)
    veneer.detach(plain)
    type(site)("0", plain[0]).set_weight(torch.as_tensor(W))
    return plain(x)


def move(model, x, how):
    """Moves the base in one of the ways that training, loading and hands take."""
    weight = model[0].weight
    if how == "trained":
        veneer.train_only(model, "base", "default")
        opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
    elif how == "loaded":
        state = model.state_dict()
        model.load_state_dict({n: t + 0.3 if n == "0.weight" else t for n, t in state.items()})
    elif how == "written":
        with torch.no_grad():
            weight.mul_(1.5).add_(0.2)
    elif how == "copied":
        with torch.no_grad():
            weight.copy_(weight * 1.5 + 0.2)
    elif how == "through .data":  # which PyTorch records nowhere: docs/promises.md says what to do after it
        weight.data.mul_(1.5).add_(0.2)
        with torch.no_grad():
            weight.mul_(1)
    else:
        model[0].weight = nn.Parameter(weight.detach() * 0.5 + 0.1)


@pytest.mark.parametrize("how", ["trained", "loaded", "written", "copied", "through .data", "replaced"])
@pytest.mark.parametrize(("method", "site"), CELLS)
def test_a_method_follows_its_base(method, site, how):
    model, x = adapted(method, site)
    before = changes(model, "default")[0][0].weight().detach().clone()
    move(model, x, how)
    assert not torch.equal(changes(model, "default")[0][0].weight(), before)
    y = expected(model, x, method, before.numpy())
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", ["linear", "conv2d"])
@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.exact_gradient])
def test_the_base_gets_the_gradient_of_the_whole_formula(method, site):
    model, x = adapted(method, site)
    veneer.train_only(model, "base", "default")
    parameters = dict(model.named_parameters())

    def output(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), (x,))

    given = tuple(p.detach().clone().requires_grad_() for p in parameters.values())
    assert torch.autograd.gradcheck(output, given, fast_mode=True)


@pytest.mark.parametrize("method", [m for m, row in METHODS.items() if row.exact_gradient])
def test_the_gradient_outside_of_tracers_is_the_same(method):
    model, x = adapted(method, "linear")
    veneer.train_only(model, "base", "default")
    model(x).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    parameters = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, parameters, (x,)).square().sum()
    traced = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).square().sum())(
        {n: p.detach() for n, p in parameters.items()}
    )
    assert torch.isfinite(loss)
    for n, g in traced.items():
        torch.testing.assert_close(found[n], g, rtol=1e-9, atol=1e-9)


def test_dora_holds_its_norm_constant_in_the_gradient_of_the_base_too():
    model, x = adapted("dora", "linear")
    veneer.train_only(model, "base", "default")
    ((_, d),) = changes(model, "default")
    W = model[0].weight.detach().clone().requires_grad_()
    low = d.lora.factors(None)
    V = W + low.B.detach() @ low.A.detach()
    scale = (d.m / V.norm(dim=1)).detach()[:, None]
    (x @ (scale * V).mT + model[0].bias).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, W.grad, rtol=1e-9, atol=1e-9)


def test_norms_are_not_computed_again_while_the_base_rests(monkeypatch):
    model, x = adapted("dora", "linear")
    counted = []
    ((_, d),) = changes(model, "default")
    monkeypatch.setattr(type(d), "refresh", lambda self, site: counted.append(1))
    for _ in range(3):
        model(x).sum().backward()
    assert counted == []


def test_a_write_through_data_alone_is_the_limit():
    """Holds the limit that docs/promises.md states: if this fails, the limit is gone and its text with it."""
    model, _ = adapted("dora", "linear")
    ((site, d),) = changes(model, "default")
    before = site.stamp()
    model[0].weight.data.mul_(2)
    assert site.stamp() == before
    with torch.no_grad():
        model[0].weight.mul_(1)
    assert site.stamp() != before and torch.equal(d.base_norms(site), model[0].weight.norm(dim=1))


def test_a_traced_pass_keeps_the_norms_that_dora_has(monkeypatch):
    """A graph must not hold the stamp of the moment in which it was traced."""
    site = site_for("0", nn.Linear(5, 4).requires_grad_(False))
    delta = methods.build(methods.get("dora"), site, {"rank": 2})
    before = delta.norms.clone()
    site.module.weight.mul_(2)
    with monkeypatch.context() as m:
        m.setattr(dora, "is_traced", lambda: True)
        assert torch.equal(delta.base_norms(site), before)
    assert torch.equal(delta.base_norms(site), 2 * before)
