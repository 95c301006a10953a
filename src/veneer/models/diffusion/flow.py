"""Flow matching: Lipman et al. 2023, https://arxiv.org/abs/2210.02747; logit-normal times and their shift:
Esser et al. 2024, sections 3.1 and 5.3.2, https://arxiv.org/abs/2403.03206."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.models.diffusion.schedule import Noised, Schedule


class Flow(Schedule):
    """x_t = (1 - t) x + t e; the target is the velocity e - x. Times are t times the positions.

    Times are logit-normal, then shifted as the pipeline shifts its own: by a fixed factor, or the more, the
    more tokens a picture has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        name = config.get("_class_name")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(f"model: the scheduler must be a FlowMatchEulerDiscreteScheduler, got {name}")
        self.scheduler = self._scheduler(config)
        self.config = self.scheduler.config
        self.positions = int(self.config.num_train_timesteps)

    @staticmethod
    def _scheduler(config: Mapping[str, Any]) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler.from_config(dict(config))

    def times(self, positions: Tensor, tokens: int) -> Tensor:
        quantiles = (positions + 0.5) / self.positions
        return self.positions * self.shifted(torch.sigmoid(torch.special.ndtri(quantiles)), tokens)

    def shifted(self, t: Tensor, tokens: int) -> Tensor:
        """Returns times between 0 and 1 after the pipeline's shift."""
        if self.config.use_dynamic_shifting:
            moved: Tensor = self.scheduler.time_shift(self._log_shift(tokens), 1.0, t)
            return moved
        factor = float(self.config.shift)
        return factor * t / (1 + (factor - 1) * t)

    def _log_shift(self, tokens: int) -> float:
        """Returns the logarithm of the factor: linear in the tokens, by the scheduler's two points."""
        c = self.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return float(c.base_shift + slope * (tokens - c.base_image_seq_len))

    def noised(self, latents: Tensor, noise: Tensor, times: Tensor) -> Noised:
        t = (times / self.positions).view(-1, 1, 1, 1)
        return Noised((1 - t) * latents + t * noise, noise - latents)

    def sampler(self, steps: int, tokens: int) -> Any:
        found = self._scheduler(self.config)
        shift = {"mu": self._log_shift(tokens)} if self.config.use_dynamic_shifting else {}
        found.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), **shift)
        return found
