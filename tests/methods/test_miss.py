"""MiSS and Bat against PEFT, in memory, and where they do not fit."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from oracles import miss
from support.kept import kept_bytes
from support.models import gpt2, llama, output, randomise
from support.peer import agrees_with_peft
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.combine import to_lora
from veneer.errors import ConfigError, ShapeError

TO = ["q_proj", "k_proj", "down_proj"]  # widths 32 -> 32, 32 -> 16 and 48 -> 32
FORMS = {
    "miss": ("miss", {"rank": 8}, {"r": 8}),
    "a rank that divides nothing": ("miss", {"rank": 5}, {"r": 5}),
    "a rank above the outputs": ("miss", {"rank": 20}, {"r": 20}),
    "mini": ("miss", {"rank": 8, "mini": 4}, {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "bat": ("bat", {"rank": 8}, {"r": 8, "init_weights": "bat"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_same_outputs_gradients_and_files_as_peft(form, tmp_path):
    method, options, settings = FORMS[form]
    agrees_with_peft(
        tmp_path, method, options, TO, peft.MissConfig(target_modules=TO, task_type="CAUSAL_LM", **settings)
    )


def test_tiles_larger_than_one_number_follow_the_formula():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 8).double())
    W, x = layer[0].weight.detach().numpy().copy(), torch.randn(3, 12, dtype=torch.float64)
    veneer.attach(layer, "bat", rank=4)
    randomise(layer)
    delta = changes(layer, "default")[0][1]
    expected = miss.weight_from_bat(W, {"B": delta.B.detach().numpy()}, {})
    torch.testing.assert_close(layer(x), x @ torch.from_numpy(expected).T + layer[0].bias)
    assert np.linalg.matrix_rank(expected - W) == 8  # not a low-rank change


def test_the_backward_keeps_r_numbers_of_the_input_and_not_all():
    layer, x = nn.Linear(256, 256, bias=False), torch.randn(64, 256)
    by_method = {}
    for method in ("lora", "miss"):
        model = veneer.attach(nn.Sequential(nn.Linear(256, 256, bias=False)), method, rank=16)
        model.load_state_dict({"0.weight": layer.weight}, strict=False)
        by_method[method] = kept_bytes(model, x)
    assert by_method["lora"] >= 64 * (256 + 16) * 4
    assert by_method["miss"] <= 0.5 * by_method["lora"]


def test_it_becomes_plain_lora_without_loss():
    model = veneer.attach(llama(), "miss", rank=8)
    randomise(model)
    y = output(model)
    cuts = to_lora(model, "default", "low")
    assert max(c.rank for c in cuts) == 8 and max(c.error for c in cuts) < 1e-6
    with veneer.using(model, "low"):
        torch.testing.assert_close(output(model), y, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_with_what_would():
    with pytest.raises(
        ShapeError,
        match=r"rank 64 > in = 32 at 'model.layers.0.self_attn.q_proj'; use at most 32 or exclude the layer",
    ):
        veneer.attach(llama(), "miss")
    with pytest.raises(
        ShapeError, match=r"mini 5 does not divide out = 32 at 'model.layers.0.self_attn.q_proj'; use e.g. 4"
    ):
        veneer.attach(llama(), "miss", rank=8, mini=5)
    with pytest.raises(ConfigError, match=r"dropout must be in \[0, 1\), got 1.0"):
        veneer.attach(llama(), "miss", rank=8, dropout=1.0)
    with pytest.raises(
        ShapeError,
        match=r"rank 12 does not divide in = 32 and out = 32 at '.*q_proj'; use e.g. 8, or exclude the layer",
    ):
        veneer.attach(llama(), "bat", rank=12)
    with pytest.raises(ShapeError, match=r"rank 33 > min\(out, in\) = 32"):
        veneer.attach(llama(), "bat", rank=33, to=["q_proj"])


def test_what_peft_has_no_words_for_is_kept_in_our_own_layout(tmp_path):
    model = veneer.attach(gpt2(), "miss", rank=8)  # PEFT's MiSS takes nn.Linear only
    randomise(model)
    veneer.save(model, tmp_path)
    assert (tmp_path / "delta.safetensors").is_file()
    torch.testing.assert_close(output(veneer.load(gpt2(), tmp_path)), output(model), rtol=0, atol=0)
