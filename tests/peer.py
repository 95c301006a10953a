"""One method in Veneer and in PEFT from the same numbers: outputs, gradients, and files both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn

import veneer

IDS = torch.randint(0, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


def agrees_with_peft(
    folder: Path,
    method: str,
    options: dict[str, Any],
    to: list[str],
    config: Any,
    build: Callable[[], nn.Module] = models.llama,
    same_numbers: bool = True,
) -> nn.Module:
    """Asserts that a change made by PEFT and read here, and one made here and read by PEFT, are the same in both.

    same_numbers: whether both train the same numbers when ours is read by PEFT, and not multiples of them.
    Returns the model that Veneer read PEFT's folder into.
    """
    import peft

    theirs = peft.get_peft_model(build(), config)
    _shake(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder / "theirs")
    ours = veneer.load(build(), folder / "theirs", trainable=True)
    _same(ours, theirs)
    made = veneer.attach(build(), method, to=to, **options)
    models.randomise(made)
    veneer.save(made, folder / "ours")
    assert (folder / "ours" / "adapter_model.safetensors").is_file(), "not in PEFT's layout"
    opened = peft.PeftModel.from_pretrained(build(), folder / "ours", is_trainable=True)
    _same(made, opened, gradients=same_numbers)
    again = veneer.load(build(), folder / "ours")
    torch.testing.assert_close(models.output(again), models.output(made), rtol=1e-5, atol=1e-6)
    return ours


def _shake(model: nn.Module, trained: list[nn.Parameter]) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=draw))


def _same(ours: nn.Module, theirs: nn.Module, gradients: bool = True) -> None:
    outputs, slopes = [], []
    for model in (ours, theirs):
        model.zero_grad()
        y = model(input_ids=IDS)
        (y.logits.square().mean()).backward()
        outputs.append(y.logits.detach())
        slopes.append(_gradients(model))
    with veneer.using(ours):
        moved = float((ours(input_ids=IDS).logits - outputs[0]).detach().norm() / outputs[0].norm())
    assert moved > 1e-3, "the adapter changes nothing"
    for a, b in (outputs, slopes) if gradients else (outputs,):
        error = float((a - b).norm() / b.norm())
        assert error <= 5e-5, (tuple(a.shape), error)  # float32 through two layers and back


def _gradients(model: nn.Module) -> torch.Tensor:
    """The gradients of all trained numbers, sorted: both programs lay the same numbers out in their own ways."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).sort().values
