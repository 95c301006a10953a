"""Flux: a transformer over patches of latents, CLIP's embedding of the caption and T5's states of it.

Black Forest Labs 2024, https://github.com/black-forest-labs/flux; a transformer as in Esser et al. 2024,
https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, first_few, option
from veneer.models.diffusion.flow import Flow
from veneer.models.diffusion.kind import Conditions, Kind, Predict, States, layers

T5 = "text_encoder_2."


class Flux(Kind):
    """Patches of 2 x 2 latents are tokens. T5 stays frozen: diffusers opens no adapter of it for Flux.

    A guidance-distilled transformer takes the scale of guidance as an input: 1 in training, so that its
    conditional prediction is learned, and the asked scale in pictures.
    """

    PIPELINE = "FluxPipeline"
    PARTS = {
        "transformer": "FluxTransformer2DModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    TOKENIZERS = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}
    SCHEDULE = Flow
    PATCH = 2
    GUIDANCE = 3.5

    def side(self, predictor: Mapping[str, Any], vae: Any) -> int:
        return int(vae.config.sample_size)

    def states(self, model: Any, conditions: Conditions) -> States:
        pooled = model.text_encoder(conditions["ids"]).pooler_output
        return {"hidden": model.text_encoder_2(conditions["ids_2"]).last_hidden_state, "pooled": pooled}

    def prediction(
        self, model: Any, noisy: Tensor, times: Tensor, states: States, guidance: float = 1.0
    ) -> Tensor:
        height, width = (n // self.PATCH for n in noisy.shape[-2:])
        scale = noisy.new_full((len(noisy),), guidance) if model.transformer.config.guidance_embeds else None
        found = model.transformer(
            hidden_states=packed(noisy),
            timestep=times / self.schedule.positions,
            guidance=scale,
            pooled_projections=states["pooled"],
            encoder_hidden_states=states["hidden"],
            txt_ids=noisy.new_zeros(states["hidden"].shape[1], 3),
            img_ids=places(height, width).to(noisy),
        ).sample
        return unpacked(found, height, width)

    def guided(self, model: Any, conditions: Conditions, empty: Conditions, guidance: float) -> Predict:
        states = self.states(model, conditions)
        return lambda x, times: self.prediction(model, x, times, states, guidance).float()

    def unused(self, model: nn.Module) -> list[str]:
        return layers(model, T5)

    def check(self, model: Any) -> None:
        opened = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith(T5)]
        if opened:
            raise ConfigError(
                f"text_encoder_2 (T5) must stay frozen, got trained parameters {first_few(opened)}: diffusers"
                f" opens no adapter of it; give {option('exclude')} 'text_encoder_2.*'"
            )


def packed(x: Tensor) -> Tensor:
    """Returns latents (b, c, h, w) as tokens (b, h/2 w/2, 4 c), each a patch of 2 x 2, channel by channel."""
    b, c, h, w = x.shape
    patches = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Returns latents (b, c, 2 height, 2 width) of tokens (b, height width, 4 c)."""
    b, _, c = tokens.shape
    patches = tokens.view(b, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, 2 * height, 2 * width)


def places(height: int, width: int) -> Tensor:
    """Returns the places (height width, 3) of patches for rotary positions: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
