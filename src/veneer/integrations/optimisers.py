"""Veneer's optimisers for a training loop that is not ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from veneer import optim
from veneer.integrations.checkpoint import trained
from veneer.optim.base import groups


def build_optimiser(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    **options: Any,
) -> torch.optim.Optimizer:
    """Returns the optimiser `name` for the trained adapters of a model, with a group for every role.

    name: as `veneer methods` lists them, such as "loraplus" or "lorapro"; options: its own. Schedulers
    multiply the rate of each group; the decay that belongs to the rate is set before every step. Raises
    ConfigError for unknown names and options.

        optimiser = build_optimiser(model, "loraplus", lr=2e-4, ratio=8)
    """
    made = optim.make(name, **options)
    parts = [p for adapter in trained(model) for p in groups.of_adapter(model, adapter)]
    optimiser = made.build(optim.Trained(parts, betas=betas))
    groups.set_rates(optimiser, lr, weight_decay)

    def follow(used: torch.optim.Optimizer, *event: Any) -> None:
        first = used.param_groups[0]
        groups.set_rates(used, first["lr"] / first["scale"], weight_decay)

    optimiser.register_step_pre_hook(follow)
    return optimiser
