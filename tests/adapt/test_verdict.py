"""Verdicts on merges: limits, figures, words, and what a refused merge restores."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt import merge as module
from veneer.adapt.attached import changes
from veneer.adapt.combine import as_lora
from veneer.adapt.hooks import hang
from veneer.adapt.merge import Kept, Verdict, foresee, merge
from veneer.errors import NotMergeable
from veneer.methods.base.biased import Biased
from veneer.sites import find

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def verdict(error, logit_error=None, limit=0.5, sites=()):
    return Verdict([Kept(name, 1.0, e) for name, e in sites], error, logit_error, limit)


@pytest.mark.parametrize(
    ("error", "logit_error", "lost"),
    [
        (0.5, None, False),
        (0.5, 0.5, False),
        (0.51, None, True),
        (0.51, 0.1, True),
        (0.1, 0.51, True),
        (float("nan"), None, True),
        (0.1, float("nan"), True),
    ],
)
def test_a_change_is_lost_above_the_limit(error, logit_error, lost):
    found = verdict(error, logit_error)
    assert found.lost is lost and found.as_dict()["lost"] is lost
    assert found.as_dict()["error"] is error and found.as_dict()["logit_error"] is logit_error


SITES = [("a", 0.25), ("b", 0.75), ("c", 0.5), ("d", 0.125), ("e", 0.625)]


def test_a_verdict_names_the_worst_three_and_counts_those_above_the_limit():
    shown = "(2 of 5 layers lost more than 50%, worst b 75.0%, e 62.5%, c 50.0%)"
    assert str(verdict(0.25, sites=SITES)) == f"kept: rounding took 25.0% of the change {shown}"
    effect = "; 12.5% of its effect on the outputs"
    assert (
        str(verdict(0.25, 0.125, sites=SITES)) == f"kept: rounding took 25.0% of the change{effect} {shown}"
    )
    assert str(verdict(0.75, 0.125, sites=SITES)).startswith("LOST: rounding took 75.0% of the change; 12.5%")


@pytest.mark.parametrize(
    ("error", "logit_error", "words"),
    [
        (
            0.001,
            0.75,
            "LOST: the weights hold the change up to 0.1%, yet the outputs miss 75.0% of its effect",
        ),
        (0.01, 0.75, "LOST: rounding took 1.0%"),
        (0.015, 0.75, "LOST: rounding took 1.5%"),
        (0.001, 0.25, "kept: rounding took 0.1%"),
        (0.75, 0.75, "LOST: rounding took 75.0%"),
    ],
)
def test_outputs_that_miss_a_change_which_the_weights_hold_are_no_rounding(error, logit_error, words):
    assert str(verdict(error, logit_error)).startswith(words)


def adapted(method="lora", dtype=torch.bfloat16, size=3e-3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    veneer.attach(model, method, **options)
    randomise(model, size=size)
    return model


@pytest.mark.parametrize("into", [None, torch.float16])
def test_errors_of_layers_and_of_all_follow_their_definition(into):
    """||round(W + D) - round(W) - D|| / ||D||; W is rounded already in its own dtype."""
    model = adapted(dtype=torch.float32 if into else torch.bfloat16, rank=2)
    found = foresee(model, {"default": 1.5}, dtype=into)
    squares = []
    for (site, delta), kept in zip(changes(model, "default"), found.sites, strict=True):
        W, D = site.weight().double(), 1.5 * delta.delta(site).detach().double()
        rounded = [t.to(into or torch.bfloat16).double() for t in (W + D, W)]
        lost, norm = float((rounded[0] - rounded[1] - D).norm()), float(D.norm())
        assert kept.site == site.name and kept.norm == pytest.approx(norm, rel=1e-5)
        assert kept.error == pytest.approx(lost / norm, rel=1e-3) and kept.error > 0
        squares.append((lost**2, norm**2))
    lost, norm = (sum(column) for column in zip(*squares, strict=True))
    assert found.error == pytest.approx((lost / norm) ** 0.5, rel=1e-3)
    assert found.limit == 0.5 and found.logit_error is None


def test_a_change_of_nothing_loses_nothing():
    model = veneer.attach(nn.Sequential(nn.Linear(6, 5)), "lora", rank=2)
    found = foresee(model, {"default": 1.0})
    assert found.error == found.sites[0].error == found.sites[0].norm == 0.0
    forced = merge(model, probe={"input": X}, force=True)
    assert forced.logit_error == 1.0 and forced.limit == 0.5 and forced.lost


def test_a_merge_is_refused_unless_forced():
    model = adapted(size=1e-6, rank=2)
    with pytest.raises(NotMergeable):
        merge(model, probe={})
    assert merge(model, probe={}, force=True).lost


def biased(bias=True):
    """Two layers whose adapter adds to their biases too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Linear(5, 4, bias=bias)).double()
    found = []
    for site in find(model, "all-linear"):
        low = as_lora(site, torch.randn(2, site.in_).double(), torch.randn(site.out, 2).double())
        found.append((site, Biased(site, low, torch.randn(site.out))))
    hang(model, "default", found)
    return model


def test_biases_need_a_bias_to_be_merged_into():
    with pytest.raises(NotMergeable, match="0, 1 have no bias that the adapter's could be written to"):
        merge(biased(bias=False), probe={})


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_biases_are_merged_at_their_strength(strength):
    model = biased()
    with veneer.using(model, {"default": strength}):
        y = model(X.double())
    merge(model, {"default": strength}, probe={"input": X.double()})
    torch.testing.assert_close(model(X.double()), y, rtol=1e-9, atol=1e-9)


def test_a_refused_merge_restores_weights_and_biases(monkeypatch):
    model = biased()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    real = module._write

    def spoils(model, wanted):
        ties = real(model, wanted)
        for layer in model:
            layer.weight.data.mul_(2)
        return ties

    monkeypatch.setattr(module, "_write", spoils)
    with pytest.raises(NotMergeable):
        merge(model, probe={"input": X.double()}, limit=0.01)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("layers", [["0"], ["0", "1"], []])
def test_a_finer_format_is_advised_where_some_adapted_layer_is_quantised(layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).bfloat16()
    for name in layers:
        model._modules[name] = veneer.quantise(nn.Sequential(copy.deepcopy(model[int(name)])), "int8")[0]
    veneer.attach(model, "lora", rank=2)
    randomise(model, size=1e-7)
    with pytest.raises(NotMergeable) as e:
        merge(model, probe={})
    assert ("bfloat16 is finer than the base's quantised format" in str(e.value)) == bool(layers)
