"""Magnitude and Wanda pruning, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support import models

from veneer.compress.prune import prune
from veneer.errors import ConfigError
from veneer.sites import find


def batches():
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, models.VOCABULARY, (2, 9), generator=draw)} for _ in range(3)]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
def test_magnitude_zeroes_the_smallest_numbers_of_a_layer(sparsity):
    before = {s.name: s.weight().detach().clone() for s in find(models.llama())}
    model = prune(models.llama(), "magnitude", sparsity=sparsity)
    for site in find(model):
        W, old = site.weight(), before[site.name]
        gone = W == 0
        assert int(gone.sum()) == int(sparsity * W.numel())
        assert torch.equal(W[~gone], old[~gone])
        assert not gone.any() or old[gone].abs().max() <= old[~gone].abs().min()


def test_wanda_weighs_by_the_inputs_row_by_row():
    model, seen = models.llama(), []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(args[0].detach().flatten(0, 1)))
    for batch in batches():
        model(**batch)
    handle.remove()
    scores = layer.weight.detach().abs() * torch.cat(seen).square().sum(0).sqrt()
    prune(model, "wanda", sparsity=0.5, data=batches())
    gone = layer.weight == 0
    assert (gone.sum(1) == layer.in_features // 2).all()
    for kept, score in zip(~gone, scores, strict=True):
        assert score[kept].min() >= score[~kept].max() * (1 - 1e-5)


def test_settings_out_of_range_are_refused():
    for way, sparsity, data, told in (
        ("wand", 0.5, (), "unknown way 'wand' of pruning; did you mean 'wanda'"),
        ("magnitude", 1.0, (), "sparsity must be at least 0 and below 1, got 1"),
        ("wanda", 0.5, (), "wanda needs batches"),
    ):
        with pytest.raises(ConfigError, match=told):
            prune(models.llama(), way, sparsity=sparsity, data=data)
