"""LoKr: factors of its product, the order of its products, and its sides."""

from __future__ import annotations

import pytest
import torch
from support.kept import kept_bytes
from support.models import randomise
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.errors import ConfigError
from veneer.methods.lokr import shape_of, split
from veneer.sites import site_for


def adapted(out, in_, **options):
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Linear(in_, out).double()), "lokr", **options)
    randomise(model, size=0.5)
    return model, *changes(model, "default")[0]


@pytest.mark.parametrize(("out", "in_", "rank"), [(24, 16, 4), (16, 24, 4)])
def test_a_product_has_exact_factors_of_the_smaller_rank(out, in_, rank):
    """p, m = 4, 4 of (4, 6) and (4, 4): rank min(p, m) r."""
    _, site, delta = adapted(out, in_, rank=1, factor=rank)
    f = delta.factors(site)
    assert f.A.shape[0] == rank
    torch.testing.assert_close(f.dense(site), delta.delta(site), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("out", "in_", "factor"), [(24, 6, 2), (24, 6, 12), (6, 24, 12)])
def test_factors_are_laid_out_by_the_shorter_side_of_the_left_one(out, in_, factor):
    _, site, delta = adapted(out, in_, rank=1, factor=factor)
    f = delta.factors(site)
    assert f.A.shape[0] == min(delta.shape.p, delta.shape.m)
    torch.testing.assert_close(f.dense(site), delta.delta(site), rtol=1e-12, atol=1e-12)


def test_a_whole_factor_has_no_low_rank():
    _, site, delta = adapted(24, 16, rank=8)
    assert "R" in dict(delta.named_parameters()) and delta.factors(site) is None


def test_the_backward_keeps_no_matrix_of_the_layers_size():
    base, x = nn.Linear(256, 256, bias=False), torch.randn(2, 256)
    model = veneer.attach(nn.Sequential(base), "lokr", rank=4)
    randomise(model)
    assert kept_bytes(model, x) < 256 * 256 * 4 / 4


def test_the_sides_follow_pefts_rule():
    site = site_for("x", nn.Linear(127, 128))
    assert shape_of(site, -1) == (8, 16, 1, 127)
    assert shape_of(site, 4) == (4, 32, 1, 127)
    assert shape_of(site, 7) == (4, 32, 1, 127)
    assert shape_of(site_for("x", nn.Conv2d(6, 4, 3)), -1) == (2, 2, 2, 27)
    with pytest.raises(ConfigError, match="factor must be at least 1, or -1, got 0"):
        veneer.attach(nn.Sequential(nn.Linear(4, 4)), "lokr", rank=1, factor=0)


@pytest.mark.parametrize("size", [1, 7, 12, 36, 64, 97])
def test_sides_of_lokr_are_the_factor_or_the_most_even_pair_below_it(size):
    for factor in (-1, *range(1, size + 3)):
        if factor > 0 and size % factor == 0:
            expected = factor
        else:
            pairs = [d for d in range(1, size + 1) if size % d == 0 and d <= size // d]
            expected = max(d for d in pairs if factor == -1 or d <= factor)
        assert split(size, factor) == (expected, size // expected)


def started(layer, **options):
    return methods.build(methods.get("lokr"), site_for("x", layer), options)


@pytest.mark.parametrize(("rank", "products"), [(3, {"L", "A", "B"}), (4, {"L", "R"})])
def test_lokr_has_a_whole_matrix_from_half_of_its_longer_side_on(rank, products):
    for layer in (nn.Linear(16, 16), nn.Conv2d(16, 16, (3, 2)), nn.Linear(8, 16), nn.Linear(16, 8)):
        found = dict(started(layer, rank=rank, factor=2).named_parameters())
        assert set(found) == products
    both = dict(started(nn.Linear(16, 16), rank=rank, factor=8, both=True).named_parameters())
    assert set(both) == ({"Lb", "La", "R"} if rank == 3 else {"L", "R"})
