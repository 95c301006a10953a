"""Paints pictures by a diffusion model, with the sampler of its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.adapt.modes import evaluating

STEPS = 20


@torch.no_grad()
def paint(
    model: Any,
    processor: Any,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    *,
    guidance: float,
    side: int,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Returns pictures (b, 3, side, side) between 0 and 1 for the conditions of captions.

    empty: the conditions of one empty caption, for classifier-free guidance. The same seed starts alike.
    """
    weight = next(p for p in model.parameters() if p.is_floating_point())
    shape = (len(conditions["ids"]), *processor.latents(side))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sampler = processor.kind.schedule.sampler(steps, processor.tokens(x))
    given, plain = ({k: v.to(weight.device) for k, v in each.items()} for each in (conditions, empty))
    with evaluating(model):
        predict = processor.kind.guided(model, given, plain, guidance)
        for t in sampler.timesteps:
            found = predict(x.to(weight), t.expand(len(x)).to(weight.device)).float().cpu()
            x = sampler.step(found, t, x).prev_sample
    pictures: Tensor = processor.decoded(x)
    return pictures
