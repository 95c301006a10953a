"""Removes AdaLoRA's least important triplets while its adapters train: one budget for all their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from veneer.adapt.attached import layers
from veneer.errors import ConfigError
from veneer.methods.adalora import AdaLoRA


def budget(step: int, steps: int, n_start: int, n_end: int, begin: float, end: float) -> int:
    """Returns the number of triplets to keep after `step` of `steps` (the paper's cubic curve)."""
    first, last = begin * steps, (1 - end) * steps
    if step <= first:
        return n_start
    left = max(0.0, 1 - (step - first) / (last - first))
    return int(n_end + (n_start - n_end) * left**3)


def hold(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Lets every step of the optimiser regularise the model's AdaLoRA changes and remove triplets.

    steps: of the whole training; the changes count them, so a resumed training goes on where it stopped. A
    model without a trained AdaLoRA is left alone. Raises ConfigError for steps below 1.
    """
    found = trained(model)
    if not found:
        return
    if steps < 1:
        raise ConfigError(f"steps must be 1 or more, got {steps}")

    def before(*_: Any) -> None:
        for delta in found:
            delta.regularise()

    def after(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        allocate(found, optimiser, steps)

    optimiser.register_step_pre_hook(before)
    optimiser.register_step_post_hook(after)


def trained(model: nn.Module) -> list[AdaLoRA]:
    """Returns the AdaLoRA changes that take gradients."""
    every = [d[name] for d in layers(model) for name in d.names()]
    return [delta for delta in every if isinstance(delta, AdaLoRA) and delta.E.requires_grad]


def allocate(found: Sequence[AdaLoRA], optimiser: torch.optim.Optimizer, steps: int) -> None:
    """Observes the gradients of a step and, on the steps meant for it, cuts to the budget.

    Every layer keeps its most important triplet.
    """
    options = found[0].options
    for delta in found:
        delta.observe()
    step = int(found[0].steps)
    if step % options["every"] and step != steps:
        return
    n_start = sum(delta.options["rank"] for delta in found)
    n_end = sum(delta.options["target"] for delta in found)
    keep = budget(step, steps, n_start, n_end, options["begin"], options["end"])
    scores = [delta.importance() for delta in found]
    firsts = [int(score.argmax()) for score in scores]
    if keep >= sum(map(len, scores)):
        return
    for score, first in zip(scores, firsts, strict=True):
        score[first] = torch.inf
    order = torch.cat(scores).argsort(descending=True, stable=True)[: max(keep, len(found))]
    kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=order.device)
    kept[order] = True
    for delta, own in zip(found, kept.split([len(s) for s in scores]), strict=True):
        if not own.all():
            delta.cut(own.nonzero()[:, 0], optimiser)
