"""Noise prediction: Ho et al. 2020, https://arxiv.org/abs/2006.11239; pictures by DDIM: Song et al. 2020,
https://arxiv.org/abs/2010.02502."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.errors import ConfigError
from veneer.models.diffusion.schedule import Noised, Schedule

PREDICTIONS = ("epsilon", "v_prediction")


class Noise(Schedule):
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) e; the target is e, or the velocity (Salimans and Ho 2022)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        name, prediction = str(config.get("_class_name")), config.get("prediction_type", "epsilon")
        if name.startswith(("EDM", "FlowMatch")) or prediction not in PREDICTIONS:
            raise ConfigError(
                f"model: the scheduler must predict {' or '.join(PREDICTIONS)} on a discrete schedule, got"
                f" {name} with {prediction}; choose a pipeline with such a scheduler"
            )
        self.scheduler: Any = DDPMScheduler.from_config(dict(config))
        self.positions = int(self.scheduler.config.num_train_timesteps)

    def times(self, positions: Tensor, tokens: int) -> Tensor:
        return positions

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, times) if velocity else noise
        return Noised(self.scheduler.add_noise(latents, noise, times), target)

    def sampler(self, steps: int, tokens: int) -> Any:
        from diffusers import DDIMScheduler

        found: Any = DDIMScheduler.from_config(self.scheduler.config)
        found.set_timesteps(steps)
        return found
