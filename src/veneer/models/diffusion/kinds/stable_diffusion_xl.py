"""Stable Diffusion XL: a UNet, two CLIP text encoders, and sizes as conditions. Podell et al. 2023,
https://arxiv.org/abs/2307.01952."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.diffusion.kind import Conditions, Kind, States, layers
from veneer.models.diffusion.noise import Noise
from veneer.models.diffusion.vae import scale


class StableDiffusionXL(Kind):
    """The UNet attends to the last but one hidden states of both encoders, side by side (section 2.1).

    Further conditions: the second encoder's embedding of the caption, and the picture's size before the cut,
    its corner, and its size after the cut (section 2.2). Their embedding stays frozen with all-linear:
    kohya's scripts train no such layer, and diffusers misreads it from their format.
    """

    PIPELINE = "StableDiffusionXLPipeline"
    PARTS = {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer"}
    SCHEDULE = Noise

    def side(self, predictor: Mapping[str, Any], vae: Any) -> int:
        return int(predictor["sample_size"]) * scale(vae)

    def framed(self, frame: tuple[int, ...]) -> dict[str, Tensor]:
        return {"frame": torch.tensor(frame, dtype=torch.float32)}

    def states(self, model: Any, conditions: Conditions) -> States:
        first = model.text_encoder(conditions["ids"], output_hidden_states=True)
        second = model.text_encoder_2(conditions["ids_2"], output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return {"hidden": hidden, "pooled": second.text_embeds, "frame": conditions["frame"]}

    def prediction(
        self, model: Any, noisy: Tensor, times: Tensor, states: States, guidance: float = 1.0
    ) -> Tensor:
        more = {"text_embeds": states["pooled"], "time_ids": states["frame"].to(noisy.dtype)}
        hidden = states["hidden"]
        found: Tensor = model.unet(noisy, times, encoder_hidden_states=hidden, added_cond_kwargs=more).sample
        return found

    def without_caption(self, states: States, n: int) -> States:
        if not self.index.get("force_zeros_for_empty_prompt", True):
            return states
        keep = torch.arange(2 * n, device=states["pooled"].device) >= n
        zeroed = {
            "hidden": states["hidden"] * keep[:, None, None],
            "pooled": states["pooled"] * keep[:, None],
        }
        return {**states, **zeroed}

    def unused(self, model: nn.Module) -> list[str]:
        encoder: Any = model.text_encoder
        last = f".encoder.layers.{int(encoder.config.num_hidden_layers) - 1}."
        skipped = [name for name in layers(model, "text_encoder.") if last in name]
        return [*layers(model, "unet.add_embedding."), *skipped]
