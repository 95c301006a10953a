"""Layers packed by bitsandbytes and torchao, which are optional and missing in the tests' environment."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import models
from torch import nn
from torch.nn.functional import linear

import veneer
from veneer.adapt.attached import changes


def four_bits(layer: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32
    )
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def torchao(layer: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(copy.deepcopy(layer))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.parametrize(("pack", "error"), [(four_bits, 0.15), (eight_bits, 0.02), (torchao, 0.02)])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_methods_train_and_merge_on_layers_of_other_libraries(
    pack: Any, error: float, method: str, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    model, x = nn.Sequential(pack(layer)), torch.randn(5, 128, requires_grad=True)
    veneer.attach(model, method, to=["0"], rank=4)
    models.randomise(model, size=0.3)
    ((site, delta),) = changes(model, "default")
    assert (site.weight() - layer.weight).norm() < error * layer.weight.norm()
    W = (site.weight() + delta.delta(site)).detach()
    y = model(x)
    torch.testing.assert_close(y, linear(x, W, layer.bias), rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones(5, 64) @ W, rtol=1e-3, atol=1e-3)
    veneer.save(model, tmp_path / "a")
    plain = veneer.dequantise(copy.deepcopy(model))
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)
    assert type(plain[0]) is nn.Linear and veneer.merge(plain).error < 1e-5
    assert 0 < veneer.merge(model, probe={}).error < error
    assert (model(x) - y).norm() < error * y.norm()
