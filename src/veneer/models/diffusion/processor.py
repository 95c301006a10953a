"""Tokenizers, picture encoder (VAE) and noise schedule of a text-to-image pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError
from veneer.models.diffusion import opening
from veneer.models.diffusion.kind import Kind
from veneer.models.diffusion.vae import scale


class DiffusionProcessor:
    """Prepares pictures and captions. own_side: pixels of a side of the pipeline's own pictures."""

    def __init__(self, kind: Kind, tokenizers: list[Any], vae: Any, own_side: int) -> None:
        self.kind, self.tokenizers, self.own_side = kind, tokenizers, own_side
        self.vae = vae.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str, *, trust_remote_code: bool = False) -> DiffusionProcessor:
        """Returns the processor of a pipeline's folder. Raises ConfigError for other pipelines."""
        kind = opening.kind(folder, trust_remote_code)
        vae = opening.part(folder, "vae", "AutoencoderKL")
        name = next(iter(kind.PARTS))
        predictor = opening.config(folder, f"{name}/config.json")
        if kind.channels(predictor) != vae.config.latent_channels:
            raise ConfigError(
                f"model: the {name} must take the VAE's {vae.config.latent_channels} channels, got"
                f" {kind.channels(predictor)}; pipelines that complete or edit pictures are not trained"
            )
        tokenizers = [opening.part(folder, *each) for each in kind.TOKENIZERS.items()]
        return cls(kind, tokenizers, vae, kind.side(predictor, vae))

    @property
    def tokenizer(self) -> Tokenizer:
        """The first tokenizer."""
        found: Tokenizer = self.tokenizers[0]
        return found

    def side(self, asked: int) -> int:
        """Returns the pixels of a picture's side: those asked for, or the pipeline's own for 0.

        Raises ConfigError for a side that has no whole number of patches.
        """
        found, patch = asked or self.own_side, self.kind.PATCH * scale(self.vae)
        if found < patch or found % patch:
            raise ConfigError(f"side must be a multiple of {patch} pixels, got {found}")
        return found

    def latents(self, side: int) -> tuple[int, int, int]:
        """Returns the shape (c, h, w) of a picture's latents."""
        size = side // scale(self.vae)
        return int(self.vae.config.latent_channels), size, size

    def tokens(self, latents: Tensor) -> int:
        """Returns the number of patches of latents (b, c, h, w)."""
        return int(latents.shape[-2] * latents.shape[-1]) // self.kind.PATCH**2

    def conditions(self, caption: str, frame: tuple[int, ...]) -> dict[str, Tensor]:
        """Returns the token ids of a caption, cut and padded to each text encoder's length, and the frame."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        found: dict[str, Tensor] = {}
        for i, tokenizer in enumerate(self.tokenizers, 1):
            given = tokenizer(caption, max_length=tokenizer.model_max_length, **options)
            found["ids" if i == 1 else f"ids_{i}"] = given["input_ids"][0]
        return {**found, **self.kind.framed(frame)}

    @torch.no_grad()
    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation (c, h, w) of the latents of pixels (3, height, width) in -1 to 1."""
        found = self.vae.encode(x[None]).latent_dist
        factor, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        return (found.mean[0] - shift) * factor, found.std[0] * factor

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Returns pixels (b, 3, height, width) between 0 and 1 of latents (b, c, h, w)."""
        factor, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        x = self.vae.decode(latents.float().cpu() / factor + shift).sample
        found: Tensor = (x / 2 + 0.5).clamp(0, 1)
        return found
