"""LoLDU, LoRA-XS and VeRA: their starts, what they keep, PEFT's VeRA, and what does not fit."""

from __future__ import annotations

import peft
import pytest
import torch
from support.kept import kept_bytes
from support.models import gpt2, llama, output, randomise
from support.peer import agrees_with_peft
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.combine import to_lora
from veneer.errors import ConfigError, FormatError, ShapeError

TO = ["q_proj", "k_proj", "down_proj"]


@pytest.mark.parametrize(("out", "in_"), [(6, 9), (9, 6), (7, 7)])
def test_ldu_factors_multiply_to_the_weight(out, in_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_, out).double())
    veneer.attach(model, "loldu", rank=min(out, in_))
    site, d = changes(model, "default")[0]
    torch.testing.assert_close((d.L * d.z0) @ d.U, site.weight().detach())
    assert torch.equal(d.U.tril(-1), torch.zeros_like(d.U)) and torch.allclose(
        d.U.diagonal(), torch.ones(1).double()
    )
    assert sorted((d.L == 1).sum(1).tolist())[0] >= 1 or out > in_  # a permuted unit-lower triangle
    assert sum(p.numel() for p in d.parameters()) == min(out, in_) + 1


def test_the_svd_basis_is_the_best_and_pivots_are_not():
    torch.manual_seed(0)
    W = torch.randn(64, 4).double() @ torch.randn(4, 64).double() + 0.01 * torch.randn(64, 64).double()
    left = {}
    for basis in ("lu", "svd"):
        layer = nn.Linear(64, 64).double()
        layer.weight.data.copy_(W)
        model = veneer.attach(nn.Sequential(layer), "loldu", rank=4, basis=basis)
        d = changes(model, "default")[0][1]
        left[basis] = float((W - (d.L * d.z0) @ d.U).norm())
    exact = float(torch.linalg.svdvals(W)[4:].norm())
    assert left["svd"] == pytest.approx(exact, rel=1e-6) and left["lu"] > 2 * exact


def test_a_weight_of_zeros_has_pivots_too():
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight)
    model = veneer.attach(nn.Sequential(layer), "loldu", rank=3)
    assert torch.isfinite(model(torch.randn(2, 5))).all()
    _, delta = changes(model, "default")[0]
    assert not delta.U.any() and not delta.z0.any()


@pytest.mark.parametrize("method", ["loldu", "loraxs", "vera"])
def test_frozen_factors_are_saved_keep_little_and_convert(method, tmp_path):
    x = torch.randn(64, 256)
    lora = kept_bytes(veneer.attach(nn.Sequential(nn.Linear(256, 256, bias=False)), "lora", rank=16), x)
    assert (
        kept_bytes(veneer.attach(nn.Sequential(nn.Linear(256, 256, bias=False)), method, rank=16), x.clone())
        <= 0.5 * lora
    )
    model = veneer.attach(gpt2(), method, rank=6, seed=3)
    randomise(model)
    veneer.save(model, tmp_path)
    again = veneer.load(gpt2(), tmp_path)
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)
    for (_, a), (_, b) in zip(changes(again, "default"), changes(model, "default"), strict=True):
        torch.testing.assert_close(
            a.state_dict(), b.state_dict()
        )  # the same numbers go on training, not multiples of them
        assert a.options == b.options
    y = output(model)
    assert max(c.rank for c in to_lora(model, "default", "low")) == 6
    with veneer.using(model, "low"):
        assert float((output(model) - y).norm() / y.norm()) < 1e-4


def test_vera_has_the_outputs_gradients_and_files_of_peft(tmp_path):
    config = peft.VeraConfig(target_modules=TO, task_type="CAUSAL_LM", r=24, projection_prng_key=3)
    agrees_with_peft(tmp_path, "vera", {"rank": 24}, TO, config, same_numbers=False)


def test_a_file_of_vera_says_what_its_pair_was_drawn_from(tmp_path):
    model = veneer.attach(llama(), "vera", rank=5, seed=3, start=0.2)
    randomise(model)
    veneer.save(model, tmp_path)
    config = peft.VeraConfig.from_pretrained(tmp_path)
    assert (config.r, config.projection_prng_key, config.d_initial, config.save_projection) == (
        5,
        3,
        0.2,
        True,
    )


def test_vera_draws_one_pair_for_all_layers():
    model = veneer.attach(llama(), "vera", rank=5)
    wide = next(d for s, d in changes(model, "default") if s.in_ == 48)
    for site, d in changes(model, "default"):
        assert torch.equal(d.A, wide.A[:, : site.in_])
        assert float(d.A.std()) == pytest.approx(1, rel=0.2)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown basis 'svt'; did you mean 'svd'\?"):
        veneer.attach(llama(), "loldu", rank=4, basis="svt")
    for method in ("loldu", "loraxs"):
        with pytest.raises(ShapeError, match=r"rank 17 > min\(out, in\) = 16 at '.*k_proj'"):
            veneer.attach(llama(), method, rank=17, to=["k_proj"])
        for alpha in (-1, 0, float("inf"), float("nan")):
            with pytest.raises(
                ConfigError, match=f"alpha must be a (number above 0|finite number), got {alpha}"
            ):
                veneer.attach(llama(), method, rank=4, alpha=alpha)
    for method in ("vera", "loraxs"):
        with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 2"):
            veneer.attach(llama(), method, rank=4, dropout=2)
    with pytest.raises(ShapeError, match="rank must be >= 1, got 0 at"):
        veneer.attach(llama(), "vera", rank=0)
    config = peft.VeraConfig(target_modules=TO, task_type="CAUSAL_LM", r=4, save_projection=False)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(
        FormatError,
        match=r"vera_A and vera_B are missing in the file, .* save it in PEFT with save_projection=True",
    ):
        veneer.load(llama(), tmp_path)
