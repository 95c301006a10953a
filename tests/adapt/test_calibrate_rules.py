"""Calibration, leading parts found together, and options of single layers: limits and what is restored."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import veneer
from veneer.adapt import leading_parts
from veneer.adapt.attached import layers
from veneer.adapt.leading_parts import Ahead
from veneer.errors import ConfigError, ShapeError, SiteError
from veneer.methods import Stats
from veneer.methods.lora import LoRA
from veneer.sites import find

X = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))


def loss(model, x):
    return model(x).square().sum()


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 40))


def test_settings_that_are_not_given_are_those_of_the_page():
    """Rank 8 and width 4, seed 0; twice the rank is kept, and nothing of the inputs."""
    plain = veneer.calibrate(wide(), [X], loss=loss)
    given = veneer.calibrate(
        wide(), [X], loss=loss, rank=8, width=4, seed=0, inputs=False, untie=False, to=None, exclude=()
    )
    for name, stats in plain.items():
        assert stats.gradient.S.shape == (16,)
        assert stats._replace(gradient=None) == Stats(None)
        for a, b in zip(stats.gradient, given[name].gradient, strict=True):
            assert torch.equal(a, b)
    narrow = [
        veneer.calibrate(wide(), [X], loss=loss, rank=2, **own) for own in ({}, {"seed": 0}, {"seed": 1})
    ]
    U, same, other = (stats["0"].gradient.U for stats in narrow)
    assert torch.equal(U, same) and not torch.equal(U, other)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank 0 must be 1 or more"),
        ({"width": 1}, "width 1 must be 2 or more"),
        ({"rank": -1, "width": 0}, "rank -1 must be 1 or more\nwidth 0 must be 2"),
    ],
)
def test_impossible_sizes_are_refused_together(options, text):
    with pytest.raises(ConfigError, match=text):
        veneer.calibrate(wide(), [X], loss=loss, **options)
    assert len(veneer.calibrate(wide(), [X], loss=loss, rank=1, width=2)) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda m, x: 3.0, "not 3.0"),
        (lambda m, x: m(x), r"not a tensor \(60, 40\)"),
        (lambda m, x: m(x)[:0].sum(1), r"not a tensor \(0,\)"),
        (lambda m, x: m(x).sum().detach(), r"not a tensor \(\)"),
    ],
)
def test_losses_that_are_no_number_to_differentiate_are_refused(value, text):
    model = wide()
    with pytest.raises(ConfigError, match=f"one number to differentiate for each batch, {text}"):
        veneer.calibrate(model, [X], loss=value)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


def test_the_model_is_left_with_its_flags():
    model = veneer.attach(wide(), "lora", rank=2, name="own").train()
    model[0].weight.requires_grad_(True)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    seen = []

    def spying(m, x):
        seen.append((m.training, sorted(n for n, p in m.named_parameters() if p.requires_grad)))
        return loss(m, x)

    veneer.calibrate(model, [X, X], loss=spying, rank=2)
    sketches = sorted(f"{i}.deltas.calibration.{n}" for i in (0, 2) for n in "YZ")
    assert seen == [(False, sketches)] * 2
    assert model.training and {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not any(d.called for d in layers(model)) and veneer.adapters(model) == ["own"]


@pytest.mark.parametrize("to", [None, "all-linear", ["0", "unused"]])
def test_layers_that_no_batch_reaches_are_left_out_or_refused(to):
    model = wide()
    model.add_module("unused", nn.Linear(40, 40))
    model.forward = lambda x: model[2](model[0](x))
    if isinstance(to, list):
        with pytest.raises(SiteError, match="never called"):
            veneer.calibrate(model, [X], loss=loss, rank=2, to=to)
    else:
        with pytest.warns(UserWarning, match="1 of 3 adapted layers are not reached"):
            assert sorted(veneer.calibrate(model, [X], loss=loss, rank=2, to=to)) == ["0", "2"]


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 0.0])
def test_gradients_that_are_not_finite_or_zero_are_named_apart(odd):
    """One number of the loss's gradient is spoiled, or none reaches the layer."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fine, self.odd = nn.Linear(40, 3), nn.Linear(40, 3)

        def forward(self, x):
            scale = torch.zeros(3) if odd == 0.0 else torch.tensor([1.0, odd, 1.0])
            return self.fine(x).sum() + (self.odd(x) * scale).sum()

    text = "the loss has no gradient at 1 layers: odd" if odd == 0.0 else "is not finite at 1 layers: odd"
    with pytest.raises(SiteError, match=text) as e:
        veneer.calibrate(Two(), [X], loss=lambda m, x: m(x), rank=1)
    assert "\n" not in str(e.value) and "fine" not in str(e.value)


@pytest.fixture
def stacks(monkeypatch):
    """Records how many matrices are factored at once, without factoring them."""
    found = []

    def fake(weights, rank, draws):
        found.append(len(weights))
        return [(W[:, :1], W[0, :1], W[:1]) for W in weights]

    monkeypatch.setattr(leading_parts, "leading_svds", fake)
    return found


PISSA = {"init": "pissa", "rank": 2}


@pytest.mark.parametrize(
    ("device", "width", "n", "wanted"),
    [
        ("cpu", 256, 18, [16, 2]),
        ("cpu", 512, 5, [4, 1]),
        ("cpu", 1024, 2, [1, 1]),
        ("cpu", 2048, 2, [1, 1]),
        ("cuda", 1024, 130, [128, 2]),
        ("xpu", 1, 2, [1, 1]),
    ],
)
def test_as_many_matrices_are_factored_at_once_as_were_measured_to_be_faster(
    device, width, n, wanted, stacks, monkeypatch
):
    monkeypatch.setattr(leading_parts, "master_dtype", lambda site: torch.float32)
    small = torch.ones(2, 2)
    sites = [
        SimpleNamespace(key=f"{i}", out=width, in_=width, device=torch.device(device), weight=lambda: small)
        for i in range(n)
    ]
    ahead = Ahead(LoRA, sites, [{**PISSA, "rank": 1}] * n)
    assert all(ahead.of(i, None).leading is not None for i in range(n))
    assert stacks == wanted


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"init": "pissa", "rank": 1}, True),
        ({"init": "pissa", "rank": 4}, True),
        ({"init": "pissa", "rank": 5}, False),
        ({"init": "pissa", "rank": 0}, False),
        ({"init": "pissa", "rank": 2.0}, False),
        ({"init": "pissa", "rank": "2"}, False),
        ({"rank": 2}, False),
    ],
)
def test_parts_are_found_where_a_start_asks_for_them_and_the_rank_fits(options, found):
    sites = list(find(nn.Sequential(nn.Linear(6, 4)), "all-linear"))
    known = Stats(gradient="kept")
    made = Ahead(LoRA, sites, [options]).of(0, known)
    assert made.gradient == "kept" and (made.leading is not None) is found
    meta = list(find(nn.Sequential(nn.Linear(6, 4)).to("meta"), "all-linear"))
    assert Ahead(LoRA, meta, [options]).of(0, None) is None


@pytest.mark.parametrize(("n", "more"), [(5, ""), (6, "and 1 more"), (8, "and 3 more")])
def test_five_problems_are_shown_and_the_others_counted(n, more):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(n)))
    with pytest.raises(ShapeError) as e:
        veneer.attach(model, "lora", rank=5)
    lines = str(e.value).split("\n")
    assert lines[5:] == ([more] if more else []) and all("rank 5 > min" in line for line in lines[:5])


def test_statistics_must_speak_of_named_layers_and_may_be_silent_of_others():
    stats = veneer.calibrate(wide(), [X], loss=loss, rank=2, to=["0"])
    with pytest.raises(ConfigError, match="stats= says nothing of 1 layers: 2; calibrate"):
        veneer.attach(wide(), "lora", rank=2, init="loraga", stats=stats, to=["0", "2"])
    model = veneer.attach(wide(), "lora", rank=2, init="loraga", stats=stats)
    assert [d.site.name for d in layers(model)] == ["0"]
    with pytest.raises(ConfigError, match="starts without a look at the loss"):
        veneer.attach(wide(), "bitfit", stats=stats)
