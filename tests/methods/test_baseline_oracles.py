"""BitFit, bottleneck adapters and prefix-tuning on a whole model: outputs and gradients are those of the
papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import bitfit, bottleneck
from oracles import gpt2 as oracle
from support.models import gpt2, randomise
from torch import Tensor, nn

import veneer
from veneer.adapt.attached import changes

IDS = torch.tensor([5, 41, 7, 7, 90, 12, 3])
MODULES = {"attention": "attn", "feed-forward": "mlp"}
Trained = dict[tuple[str, str], Tensor]  # by module and name


def weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in gpt2().double().named_parameters()}


def adapted(method: str, **options) -> nn.Module:
    model = veneer.attach(gpt2().double(), method, **options)
    randomise(model, size=0.3)
    return model


def assert_agrees(model: nn.Module, logits: Callable[[Trained], Tensor]) -> None:
    """The model's logits, and the gradient of every trained number, are those of `logits`, which depends on
    the trained tensors."""
    own = {
        (site.name, name): p
        for site, delta in changes(model, "default")
        for name, p in delta.named_parameters()
    }
    leaves = {key: p.detach().clone().requires_grad_() for key, p in own.items()}
    y, expected = model(input_ids=IDS[None]).logits[0], logits(leaves)
    torch.testing.assert_close(y, expected)
    assert (y - oracle.logits(weights(), IDS)).abs().max() > 0.01, "nothing is changed"
    y.sin().sum().backward()
    for (key, p), gradient in zip(
        own.items(), torch.autograd.grad(expected.sin().sum(), list(leaves.values())), strict=True
    ):
        torch.testing.assert_close(p.grad, gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("placement", bottleneck.PARTS)
@pytest.mark.parametrize("curve", bottleneck.CURVES)
def test_bottleneck(placement, curve):
    parts = bottleneck.PARTS[placement]

    def logits(leaves: Trained) -> Tensor:
        assert len(leaves) == 2 * len(parts) * 4

        def change(part: str, layer: int, x: Tensor, h: Tensor) -> Tensor:
            lead = f"transformer.h.{layer}.{MODULES[part]}"
            t = {name: p for (module, name), p in leaves.items() if module.startswith(lead)}
            return bottleneck.changed(t, placement, curve, x, h) if part in parts else h

        return oracle.logits(weights(), IDS, change)

    assert_agrees(adapted("bottleneck", rank=3, placement=placement, activation=curve), logits)


def test_bitfit():
    assert_agrees(
        adapted("bitfit"),
        lambda d: oracle.logits(bitfit.weights(weights(), {module: p for (module, _), p in d.items()}), IDS),
    )


def test_prefix():
    def logits(leaves: Trained) -> Tensor:
        front = [tuple(leaves[f"transformer.h.{layer}.attn", name] for name in "KV") for layer in range(2)]
        return oracle.logits(weights(), IDS, front=front)

    assert_agrees(adapted("prefix", length=3), logits)
