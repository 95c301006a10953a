"""Trained rank pruning: forms of convolutions, the proximal step, projections, and the factored network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from torch import nn

import veneer
from veneer.compress.trp.forms import FactoredConv, form_of
from veneer.errors import ConfigError, SiteError
from veneer.ops.matrix.shrink import rank_of_energy, soften, spectrum
from veneer.sites import find
from veneer.sites.factored.layers import Factored

CONVS = {
    "plain": dict(kernel_size=3, padding=1),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "uneven": dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2)),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "same": dict(kernel_size=3, padding="same"),
    "valid": dict(kernel_size=3, padding="valid"),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "without bias": dict(kernel_size=3, bias=False),
}


def factored(form, rank: int | None = None) -> nn.Module:
    U, S, Vh = torch.linalg.svd(form.matrix(form.weight.detach()), full_matrices=False)
    r = rank or len(S)
    return form.factored(S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt())


# -- forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "spatial"])
@pytest.mark.parametrize("how", CONVS)
def test_at_full_rank_a_pair_of_convolutions_is_the_convolution(kind, how):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, **CONVS[how]).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    form = form_of(conv, kind)
    torch.testing.assert_close(form.tensor(form.matrix(conv.weight)), conv.weight)
    pair = factored(form)
    assert isinstance(pair, FactoredConv)
    torch.testing.assert_close(pair(x), conv(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 5])
def test_parameters_are_those_of_the_paper(rank):
    N, C, kh, kw = 16, 8, 3, 5
    conv = nn.Conv2d(C, N, (kh, kw), bias=False)
    counts = {"channel": rank * (C * kh * kw + N), "spatial": rank * (C * kh + N * kw)}
    for kind, n in counts.items():
        assert sum(p.numel() for p in factored(form_of(conv, kind), rank).parameters()) == n


def test_layers_without_a_low_rank_to_gain_have_no_form():
    assert form_of(nn.Conv2d(4, 4, 3, groups=2), "channel") is None and form_of(nn.ReLU(), "channel") is None
    assert type(form_of(nn.Conv2d(4, 4, 1), "spatial")).__name__ == "ChannelForm"
    assert type(form_of(nn.Conv2d(4, 4, 2, padding="same"), "spatial")).__name__ == "ChannelForm"
    assert type(form_of(nn.Linear(4, 4), "spatial")).__name__ == "LinearForm"


# -- projections -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), amount=st.floats(0, 3), seed=st.integers(0, 2**31))
def test_shrinking_is_the_proximal_step_of_the_nuclear_norm(m, n, amount, seed):
    W = np.random.default_rng(seed).normal(size=(m, n))
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    expected = (U * np.maximum(S - amount, 0)) @ Vh
    found = spectrum(torch.as_tensor(W))
    made = found.weigh(torch.as_tensor(W), soften(found.S, amount))
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-6)


def test_energy_keeps_as_many_directions_as_it_takes():
    S = torch.tensor([2.0, 1.0, 1.0, 0.5])  # squares 4, 1, 1, 0.25 of 6.25
    assert [rank_of_energy(S, e) for e in (0.1, 0.64, 0.65, 0.8, 0.96, 0.97, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    W = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    assert 52 <= rank_of_energy(spectrum(W).S, 0.9) <= 54
    assert rank_of_energy(torch.zeros(3), 0.9) == 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, stride=2)
        self.head = nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        y: torch.Tensor = self.head(h.mean((2, 3)))
        return y


def trained(steps: int, kind: str = "sgd", **options):
    """A net after steps with TRP, and the TRP."""
    model, draw = Net(), torch.Generator().manual_seed(1)
    optimiser = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=1e-2)
    )
    trp = veneer.TRP(model, optimiser, **options)
    for _ in range(steps):
        x, y = torch.randn(8, 3, 8, 8, generator=draw), torch.randint(0, 6, (8,), generator=draw)
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
        trp.step()
    return model, trp


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("form", ["channel", "spatial"])
def test_a_projection_leaves_weight_and_momentum_in_the_same_few_directions(kind, form):
    _, trp = trained(4, kind, every=4, energy=0.7, nuclear=0.0, form=form)
    ranks = trp.ranks({n: spectrum(f.matrix(f.weight.detach())).S for n, f in trp.forms.items()})
    for name, f in trp.forms.items():
        W = f.matrix(f.weight.detach()).double()
        S = torch.linalg.svdvals(W)
        r = int((S > 1e-5 * S[0]).sum())
        assert ranks[name] <= r < min(W.shape)
        state = trp.optimiser.state[f.weight]
        M = f.matrix(state["momentum_buffer" if kind == "sgd" else "exp_avg"]).double()
        basis = torch.linalg.svd(W)
        outside = M @ basis.Vh[r:].mT if W.shape[1] <= W.shape[0] else basis.U[:, r:].mT @ M
        assert float(outside.norm()) < 1e-4 * float(M.norm())


def test_between_projections_nothing_is_touched_and_the_rates_are_summed():
    _, trp = trained(3, every=4, energy=0.5, nuclear=0.1)
    assert all(
        int((torch.linalg.svdvals(f.matrix(f.weight)) > 1e-6).sum()) == min(f.shape)
        for f in trp.forms.values()
    )
    assert trp.owed == pytest.approx(3 * 0.1 * 0.1)
    before = {n: torch.linalg.svdvals(f.matrix(f.weight.detach())) for n, f in trp.forms.items()}
    trp.energy = 1.0
    trp.project()
    for n, f in trp.forms.items():
        after = torch.linalg.svdvals(f.matrix(f.weight.detach()))
        torch.testing.assert_close(after, (before[n] - 0.03).clamp_min(0), rtol=1e-4, atol=1e-4)
    assert trp.owed == 0


def test_the_nuclear_norm_shrinks_directions_that_a_projection_would_keep():
    small, large = (trained(12, every=3, energy=1.0, nuclear=n)[1] for n in (0.0, 0.3))
    norms = [
        {n: float(torch.linalg.svdvals(f.matrix(f.weight.detach())).sum()) for n, f in t.forms.items()}
        for t in (small, large)
    ]
    assert all(norms[1][n] < norms[0][n] for n in norms[0])


# -- the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["channel", "spatial"])
@pytest.mark.parametrize("options", [{"energy": 0.6}, {"budget": 0.5}])
def test_the_finished_network_is_the_projected_one_in_fewer_numbers(form, options):
    model, trp = trained(6, every=3, form=form, nuclear=0.0, **options)
    trp.project()
    x = torch.randn(2, 3, 8, 8)
    y, n = model(x), sum(p.numel() for p in model.parameters())
    total = sum(f.weight.numel() for f in trp.forms.values())
    steps = [sum(f.shape) for f in trp.forms.values()]
    made = trp.finish()
    assert made is model
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    left = n - sum(p.numel() for p in model.parameters())
    assert left > 0 and any(isinstance(m, FactoredConv) for m in model.modules())
    if "budget" in options:
        assert 0 <= left - 0.5 * total < max(steps)


def test_adapters_find_the_layers_of_the_finished_network():
    model, trp = trained(3, every=3, energy=0.5)
    trp.finish()
    assert isinstance(model.head, Factored) and isinstance(model.second, FactoredConv)
    x = torch.randn(2, 3, 8, 8)
    y = model(x)
    veneer.attach(model, "lora", to=["second.0", "second.1", "head"], rank=2)
    assert torch.equal(model(x), y)
    models.randomise(model)
    adapted = model(x)
    veneer.merge(model, probe={"x": x})
    torch.testing.assert_close(model(x), adapted, rtol=1e-3, atol=1e-3)
    assert len(find(model, ["second.0", "second.1"])) == 2
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_language_model_is_pruned_and_finished_too():
    model = models.llama()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trp = veneer.TRP(
        model, optimiser, budget=0.6, every=1, to="all-linear" if False else r".*(mlp|self_attn).*"
    )
    ids = torch.randint(0, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        trp.step()
    y = models.output(model)
    trp.finish()
    torch.testing.assert_close(models.output(model), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"energy": 0.0}, "energy must be above 0 and at most 1, got 0.0"),
        ({"budget": 1.5}, "budget must be above 0 and at most 1, got 1.5"),
        ({"every": 0}, "every must be 1 or more, got 0"),
        ({"nuclear": -1.0}, "nuclear must be 0 or more, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, told):
    model = Net()
    with pytest.raises(ConfigError, match=told):
        veneer.TRP(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_a_model_without_such_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    with pytest.raises(SiteError, match="no linear layer or convolution"):
        veneer.TRP(model, torch.optim.SGD(model.parameters(), lr=0.1))
