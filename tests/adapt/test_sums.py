"""Sums of adapters and extraction: formulas, limits, and the words of refusals, on two small layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.combine import as_lora, combine, extract, to_lora
from veneer.adapt.hooks import hang
from veneer.errors import ConfigError, FormatError, NotMergeable, ShapeError
from veneer.methods.base.biased import Biased
from veneer.ops.draws import keyed
from veneer.ops.voting import dare, ties
from veneer.sites import find

WEIGHTS = {"a": 0.5, "b": -2.0}


def layers(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.LayerNorm(5), nn.Linear(5, 4, bias=bias)).double()


def crowded(**methods):
    model = layers()
    for i, (name, method) in enumerate(methods.items()):
        options = {"oft": {"block": 2}, "bitfit": {}, "full": {}}.get(method, {"rank": 2})
        to = ["0"] if method == "oft" else ["0", "2"]
        veneer.attach(model, method, to=to, name=name, **options)
        randomise(model, name, seed=i, size=0.3)
    return model


def dense(model, name):
    return {site.name: delta.delta(site).detach() for site, delta in changes(model, name)}


def best(D, rank):
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize("how", ["ties", "ties-scaled", "dare"])
@pytest.mark.parametrize("given", [{}, {"density": 0.25, "seed": 3}, {"density": 1.0}])
def test_dense_sums_follow_their_formulas(how, given):
    """density is 0.5 and the seed 0 unless given; each adapter and layer has draws of its own."""
    model = crowded(a="lora", b="lora")
    share, seed = given.get("density", 0.5), given.get("seed", 0)
    parts = {n: dense(model, n) for n in WEIGHTS}
    combine(model, WEIGHTS, "mix", how=how, rank=3, **given)
    for site, found in dense(model, "mix").items():
        Ds = [parts[n][site] for n in WEIGHTS]
        if how == "dare":
            kept = [dare(D, share, keyed(seed, f"{n}\0{site}")) for n, D in zip(WEIGHTS, Ds, strict=True)]
            whole = WEIGHTS["a"] * kept[0] + WEIGHTS["b"] * kept[1]
        else:
            whole = ties(Ds, [*WEIGHTS.values()], share, scaled=how == "ties-scaled")
        torch.testing.assert_close(found, best(whole, 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "dora", "hra"])
def test_any_method_is_made_a_lora_at_its_own_size(method):
    model = crowded(a=method)
    wanted = dense(model, "a")
    cuts = {c.site: c for c in to_lora(model, "a", "low", rank=2)}
    for site, found in dense(model, "low").items():
        torch.testing.assert_close(found, best(wanted[site], 2), rtol=1e-9, atol=1e-9)
        assert cuts[site].rank == 2


@pytest.mark.parametrize("density", [-0.5, 0.0, 1.5])
def test_densities_outside_the_limits_are_refused(density):
    with pytest.raises(ConfigError, match=rf"density must be in \(0, 1\], got {density}"):
        combine(crowded(a="lora"), {"a": 1.0}, "mix", how="dare", rank=2, density=density)


REFUSED = {
    "without factors": (dict(a="lora", b="oft"), "'b' at '0': its change has no low rank; give rank="),
    "dora": (dict(a="lora", b="dora"), "'b' at '0': its change has no low rank; give rank="),
    "bitfit": (dict(a="bitfit"), "'a' changes '0' otherwise than by a matrix"),
    "whole": (dict(a="full"), "'a' changes '0' otherwise than by a matrix"),
}


def test_biases_beside_a_low_rank_are_refused():
    model = layers()
    (site, _) = find(model, "all-linear")
    delta = Biased(site, as_lora(site, torch.ones(1, 6), torch.ones(5, 1)), torch.ones(5))
    hang(model, "both", [(site, delta)])
    with pytest.raises(NotMergeable, match="'both' changes the bias of '0' too"):
        combine(model, {"both": 1.0}, "mix")


@pytest.mark.parametrize("kind", REFUSED)
def test_changes_that_no_low_rank_holds_are_refused(kind):
    methods, text = REFUSED[kind]
    model = crowded(**methods)
    with pytest.raises(NotMergeable, match=text):
        combine(model, {n: WEIGHTS[n] for n in methods}, "mix")
    assert "mix" not in veneer.adapters(model)


def tuned(model, *parameters):
    """A copy in which some parameters moved; one number of each weight alone."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in parameters:
            other.get_parameter(name).view(-1)[0] += 1.0
    return other


def test_a_layer_that_differs_in_one_number_is_extracted():
    model = layers()
    (cut,) = extract(model, tuned(model, "2.weight"), "x", rank=1)
    assert (cut.site, cut.rank) == ("2", 1) and cut.error < 1e-9
    (found,) = dense(model, "x").values()
    assert found[0, 0] == pytest.approx(1.0) and float(found.abs().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("also", [[], ["0.weight"]])
def test_norms_alone_are_kept_whole(also):
    model = layers()
    other = tuned(model, "1.weight", *also)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuts = extract(model, other, "x", rank=1, rest="keep")
    assert [c.site for c in cuts] == [n.partition(".")[0] for n in also]
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-9, atol=1e-9)


def test_a_layer_takes_one_kind_of_change():
    model = layers()
    with pytest.raises(NotMergeable, match="'0' changed in its weight and in another parameter"):
        extract(model, tuned(model, "0.weight", "0.bias"), "x", rank=1, rest="keep")
    (cut,) = extract(model, tuned(model, "0.weight", "2.bias"), "x", rank=1, rest="keep")
    assert cut.site == "0" and [s.name for s, _ in changes(model, "x")] == ["0", "2"]


def test_what_is_dropped_is_warned_of_where_extract_was_called():
    model = layers(bias=False)
    wide = tuned(model, "0.weight")
    wide[0].bias = nn.Parameter(torch.zeros(5).double())
    with pytest.warns(UserWarning, match=r"leaves out 1 other parameters: 0\.bias") as found:
        extract(model, wide, "x", rank=1, rest="drop")
    assert found[0].filename == __file__
    for pair in ((layers(bias=False), wide), (wide, layers(bias=False))):
        with pytest.raises(ShapeError, match=r"0\.bias: missing in one of them"):
            extract(*pair, "y", rank=1)


def test_an_unknown_rest_and_equal_models_are_refused():
    model = layers()
    with pytest.raises(ConfigError, match="unknown rest 'dorp'; did you mean 'drop'"):
        extract(model, copy.deepcopy(model), "x", rank=1, rest="dorp")
    for rest in ("refuse", "keep", "drop"):
        with pytest.raises(FormatError, match="the two models have the same weights"):
            extract(model, copy.deepcopy(model), "x", rank=1, rest=rest)
