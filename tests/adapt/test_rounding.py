"""Files in a narrower format are refused where they lose too much; the worst layers come first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.store import rounding
from veneer.errors import FormatError

SMALLEST = 2.0**-24  # the least positive float16


def holding(**sizes: float):
    """A float64 model whose changes are one number each, in units of the smallest float16."""
    model = nn.ModuleDict({n: nn.Linear(2, 2) for n in sizes}).double()
    veneer.attach(model, "lora", rank=1, alpha=1, to=list(sizes))
    with torch.no_grad():
        for site, delta in changes(model, "default"):
            delta.A.zero_(), delta.B.zero_()
            delta.A[0, 0], delta.B[0, 0] = sizes[site.name] * SMALLEST, 1.0
    return model


def test_a_loss_of_exactly_the_limit_is_accepted(monkeypatch):
    monkeypatch.setattr(rounding, "MOST_LOST", 0.2)  # no rounding to float16 loses exactly 0.05
    model = holding(layer=2.5)  # rounds to 2
    assert len(rounding.as_saved(changes(model, "default"), torch.float16, False)) == 1
    with pytest.raises(FormatError, match=r"would lose more than 20% of themselves: layer \(20%\)"):
        rounding.as_saved(changes(holding(layer=1.66), "default"), torch.float16, False)


@pytest.mark.parametrize("in_peft", [False, True])
def test_the_layers_that_lose_most_are_named_first(in_peft):
    model = holding(little=1.2, most=0.4, fine=1.0, third=1.49)
    with pytest.raises(FormatError, match=r": most \(100%\), third \(33%\), little \(17%\); save in float32"):
        rounding.as_saved(changes(model, "default"), torch.float16, in_peft)
