"""LoHa: two ways to compute it, and its two pairs in optimisers."""

from __future__ import annotations

import pytest
import torch
from support import models
from torch import nn

import veneer
from veneer import methods, optim
from veneer.adapt.attached import changes
from veneer.optim.base import groups, pairs
from veneer.optim.base.optimiser import Trained
from veneer.sites import site_for


def adapted(rank, width=40):
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Linear(width, 30).double()), "loha", rank=rank)
    models.randomise(model, size=0.5)
    (site, delta), *_ = changes(model, "default")
    return model, site, delta


@pytest.mark.parametrize(("rank", "factored"), [(4, True), (5, False)])
def test_the_rank_decides_how_it_is_computed(rank, factored):
    """r^2 (out + in) <= out in: 16 x 70 <= 1200 < 25 x 70."""
    model, site, delta = adapted(rank)
    assert (delta.normal_form(site) is not None) is factored
    x = torch.randn(6, 40, dtype=torch.float64)
    torch.testing.assert_close(delta.factors(site).dense(site), delta.delta(site), rtol=1e-12, atol=1e-12)
    expected = x @ (model[0].weight + delta.delta(site)).mT + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_an_optimiser_of_pairs_sees_two_in_every_layer():
    model, _, delta = adapted(3)
    found, others = pairs.of(groups.of_adapter(model, "default"))
    assert [
        (p.A is a, p.B is b)
        for p, (a, b) in zip(found, [(delta.A1, delta.B1), (delta.A2, delta.B2)], strict=True)
    ] == [(True, True)] * 2
    assert others == [] and [p.scaling for p in found] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "lorapro"])
def test_weight_decay_shrinks_the_whole_product_by_its_share(name):
    """Without a gradient worth the name: only the decay moves the change."""
    model, site, delta = adapted(3)
    optimiser = optim.make(name).build(Trained(groups.of_adapter(model, "default")))
    before = delta.delta(site).detach().clone()
    groups.set_rates(optimiser, 0.1, 0.5)
    for p in delta.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    torch.testing.assert_close(delta.delta(site), (1 - 0.1 * 0.5) * before, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["lorapro", "loraplus", "scaled", "lora-muon"])
def test_optimisers_of_pairs_learn(name):
    model, _, _ = adapted(3)
    torch.manual_seed(1)
    x, target = torch.randn(64, 40, dtype=torch.float64), torch.randn(64, 30, dtype=torch.float64)
    optimiser = optim.make(name).build(Trained(groups.of_adapter(model, "default")))
    losses = []
    for _ in range(30):
        groups.set_rates(optimiser, 3e-3, 0.0)
        optimiser.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("layer", "small"),
    [
        (nn.Linear(12, 6), True),  # 4 (12 + 6) = 12 x 6
        (nn.Linear(19, 5), False),  # 4 (19 + 5) > 19 x 5
        (nn.Linear(20, 5), True),
        (nn.Conv1d(20, 5, 1), False),  # whose outputs are no rows
        (nn.Embedding(20, 5), False),
    ],
)
def test_factors_serve_while_they_are_no_larger_than_w(layer, small):
    site = site_for("0", layer)
    delta = methods.build(methods.get("loha"), site, {"rank": 2})
    assert (delta.normal_form(site) is not None) == small
