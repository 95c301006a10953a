"""Stable Diffusion 1 and 2: a UNet and one CLIP text encoder. Rombach et al. 2022,
https://arxiv.org/abs/2112.10752."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.models.diffusion.kind import Conditions, Kind, States
from veneer.models.diffusion.noise import Noise
from veneer.models.diffusion.vae import scale


class StableDiffusion(Kind):
    """The UNet attends to the last hidden states of the text encoder."""

    PIPELINE = "StableDiffusionPipeline"
    PARTS = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
    TOKENIZERS = {"tokenizer": "CLIPTokenizer"}
    SCHEDULE = Noise

    def side(self, predictor: Mapping[str, Any], vae: Any) -> int:
        return int(predictor["sample_size"]) * scale(vae)

    def states(self, model: Any, conditions: Conditions) -> States:
        return {"hidden": model.text_encoder(conditions["ids"]).last_hidden_state}

    def prediction(
        self, model: Any, noisy: Tensor, times: Tensor, states: States, guidance: float = 1.0
    ) -> Tensor:
        found: Tensor = model.unet(noisy, times, encoder_hidden_states=states["hidden"]).sample
        return found
