"""Paints pictures by a diffusion model: DDIM, Song et al. 2020, https://arxiv.org/abs/2010.02502."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.adapt.modes import evaluating

STEPS = 20


@torch.no_grad()
def paint(
    model: Any,
    processor: Any,
    ids: Tensor,
    empty: Tensor,
    guidance: float,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Returns pictures (b, 3, height, width) between 0 and 1 for captions (b, n).

    empty: the tokens of the empty caption (n,), for classifier-free guidance. The same seed starts alike.
    """
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(processor.scheduler.config)
    scheduler.set_timesteps(steps)
    weight = next(p for p in model.parameters() if p.is_floating_point())
    unet = model.unet.config
    shape = (len(ids), unet.in_channels, unet.sample_size, unet.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    both = torch.cat([empty.expand_as(ids), ids]).to(weight.device)
    with evaluating(model):
        for t in scheduler.timesteps:
            noisy = scheduler.scale_model_input(torch.cat([x, x]), t).to(weight)
            without, guided = (
                model(noisy, t.expand(len(noisy)).to(weight.device), both).float().cpu().chunk(2)
            )
            x = scheduler.step(without + guidance * (guided - without), t, x).prev_sample
    found: Tensor = processor.decoded(x)
    return found
