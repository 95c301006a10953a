"""Rotations: series and exact, how orthogonal they are, the dial, the cost, and files that are refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from support import models
from support.cells import built
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, FormatError, ShapeError
from veneer.ops.matrix import rotations


def generators(norm, n=16, b=8):
    """Skew-symmetric (n, b, b) of this spectral norm, in float64."""
    torch.manual_seed(0)
    Q = rotations.skew(torch.randn(n, b * (b - 1) // 2, dtype=torch.float64), b)
    return norm * Q / torch.linalg.matrix_norm(Q, 2)[:, None, None]


def test_a_skew_matrix_has_its_numbers_above_the_diagonal_row_by_row():
    Q = rotations.skew(torch.arange(1.0, 7.0)[None], 4)[0]
    assert Q[0, 1:].tolist() == [1, 2, 3] and Q[1, 2:].tolist() == [4, 5] and Q[2, 3] == 6
    assert torch.equal(Q, -Q.mT)


@pytest.mark.parametrize("terms", range(3, 9))
def test_the_series_is_the_sum_of_powers(terms):
    Q = generators(0.4)
    eye = torch.eye(8, dtype=torch.float64)
    powers = [torch.linalg.matrix_power(Q, k) for k in range(max(terms, 4) - 1)]
    expected = (eye + Q) @ torch.stack(powers).sum(0) - eye
    torch.testing.assert_close(rotations.cayley_series(Q, terms), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(rotations.cayley_series(Q, 2), 2 * Q)


def test_the_exact_rotation_is_the_transpose_of_the_series_limit():
    Q = generators(0.3)
    exact, limit = rotations.cayley(Q), rotations.cayley_series(Q, 60)
    torch.testing.assert_close(exact, limit.mT, rtol=1e-13, atol=1e-13)
    assert float((exact - limit).abs().max()) > 0.1
    assert rotations.off_orthogonal(exact) < 1e-14


def test_an_even_number_of_terms_is_far_more_orthogonal_than_the_next():
    """The figures at norm 0.23: 1.2e-4, 4.8e-3 and 3.5e-7 for 4, 5 and 6 terms, by order of magnitude."""
    errors = {t: rotations.off_orthogonal(rotations.cayley_series(generators(0.23), t)) for t in (4, 5, 6, 8)}
    assert errors[4] < errors[5] / 10 and errors[6] < errors[4] / 100 and errors[8] < errors[6] / 100
    assert 1e-3 < errors[5] < 2e-2


def test_the_butterfly_sorts_half_blocks_and_level_0_is_the_identity():
    assert rotations.butterfly(8, 2, 0).tolist() == [*range(8)]
    assert rotations.butterfly(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rotations.butterfly(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(("method", "options"), [("oft", {"terms": 0, "block": 8}), ("boft", {"factors": 3})])
def test_the_dial_keeps_the_rotation_and_at_0_is_the_base_bit_for_bit(method, options):
    base = nn.Sequential(nn.Linear(32, 32, bias=False).double())
    torch.nn.init.orthogonal_(base[0].weight)
    model = veneer.attach(nn.Sequential(nn.Linear(32, 32, bias=False).double()), method, **options)
    model[0].weight.data.copy_(base[0].weight)
    (site, delta) = changes(model, "default")[0]
    with torch.no_grad():
        delta.get_parameter("Q" if method == "oft" else "P").normal_()
    x = torch.randn(5, 32, dtype=torch.float64)
    for t in (0.3, 1.0, 2.0, -1.0):
        W = site.weight() + delta.delta_at(site, t)
        torch.testing.assert_close(W @ W.mT, torch.eye(32).double(), rtol=1e-12, atol=1e-12)
        with veneer.using(model, {"default": t}):
            torch.testing.assert_close(model(x), x @ W.mT, rtol=1e-12, atol=1e-12)
    with veneer.using(model, {"default": 0.0}):
        assert torch.equal(model(x), base(x))


def test_alone_and_in_full_it_costs_no_product_of_the_bases_size(monkeypatch):
    model = veneer.attach(nn.Sequential(nn.Linear(16, 12)), "oft", block=4)
    models.randomise(model)
    asked = []
    site = model[0].deltas.site
    monkeypatch.setattr(type(site), "apply", lambda self, x, M: asked.append(1) or x @ M.mT)
    model(torch.randn(3, 16))
    assert not asked
    with veneer.using(model, {"default": 0.5}):
        model(torch.randn(3, 16))
    assert asked


def test_blocks_and_terms_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"block 12 does not divide in = 32 at '.*q_proj'; use e.g. 8"):
        veneer.attach(models.llama(), "oft", to=["q_proj"], block=12)
    with pytest.raises(ConfigError, match="terms must be 0 or at least 2, got 1"):
        veneer.attach(models.llama(), "oft", terms=1)
    with pytest.raises(ShapeError, match=r"block x 2\^2 = 48 does not divide in = 32 at '.*q_proj'"):
        veneer.attach(models.llama(), "boft", to=["q_proj"], block=12, factors=3)
    with pytest.raises(
        ConfigError, match="boft needs factors >= 1 and block >= 2, even with several factors"
    ):
        veneer.attach(models.llama(), "boft", block=3, factors=2)


def test_files_of_another_series_are_refused_with_the_way_out(tmp_path):
    config = peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8)
    peft.get_peft_model(models.llama(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_version": "0.17.1"}))
    with pytest.raises(FormatError, match="merge the adapter with the PEFT that trained it"):
        veneer.load(models.llama(), tmp_path)


@pytest.mark.parametrize(("method", "options"), [("oft", {"block": 4}), ("boft", {"block": 4, "factors": 2})])
def test_a_turn_of_strength_0_is_exactly_nothing(method, options):
    site, delta = built(method, nn.Linear(16, 12).double(), options)
    x, y = torch.randn(3, 16).double(), torch.randn(3, 12).double()
    assert delta.delta(site).any() and delta(x, y, site).any()
    assert not delta.delta_at(site, 0.0).any() and not delta.forward_at(x, y, site, 0.0).any()
