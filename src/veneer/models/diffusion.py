"""Stable Diffusion as one model, from a folder of diffusers: the UNet and the text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError

INDEX = "model_index.json"


class Diffusion(nn.Module):
    """The parts that adapters change, under diffusers' names: unet and text_encoder."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, name: str) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.name_or_path = unet, text_encoder, name

    @classmethod
    def from_pretrained(
        cls, folder: str, *, dtype: torch.dtype = torch.float32, output_loading_info: bool = False
    ) -> Any:
        """Returns the model, and if asked the names of missing weights. Raises ConfigError."""
        check(folder)
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        unet, of_unet = UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype, output_loading_info=True
        )
        text, of_text = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=dtype, output_loading_info=True
        )
        missing = [*of_unet["missing_keys"], *of_text["missing_keys"]]
        found = cls(unet, text, folder)
        return (found, {"missing_keys": missing, "mismatched_keys": []}) if output_loading_info else found

    def forward(self, latents: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Returns the prediction (b, c, h, w) for latents, timesteps (b,) and captions (b, n)."""
        states = self.text_encoder(input_ids).last_hidden_state
        found: Tensor = self.unet(latents, timesteps, encoder_hidden_states=states).sample
        return found


class DiffusionProcessor:
    """Tokenizer, picture encoder (VAE) and noise schedule of a pipeline; size: pixels of a picture's side."""

    def __init__(self, tokenizer: Tokenizer, vae: Any, scheduler: Any, size: int) -> None:
        self.tokenizer, self.vae, self.scheduler, self.size = (
            tokenizer,
            vae.eval().requires_grad_(False),
            scheduler,
            size,
        )

    @classmethod
    def from_pretrained(cls, folder: str) -> DiffusionProcessor:
        """Returns the processor of a pipeline's folder. Raises ConfigError for other pipelines."""
        check(folder)
        from diffusers import AutoencoderKL, DDPMScheduler
        from transformers import CLIPTokenizer

        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        unet = json.loads((Path(folder) / "unet" / "config.json").read_text(encoding="utf-8"))
        size = int(unet["sample_size"]) * 2 ** (len(vae.config.block_out_channels) - 1)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        return cls(tokenizer, vae, DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), size)

    @torch.no_grad()
    def encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation (c, h, w) of the latents of pixels (3, height, width) in -1 to 1."""
        found = self.vae.encode(x[None]).latent_dist
        scale = self.vae.config.scaling_factor
        return found.mean[0] * scale, found.std[0] * scale

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """Returns pixels (b, 3, height, width) between 0 and 1 of latents (b, c, h, w)."""
        x = self.vae.decode(latents.float().cpu() / self.vae.config.scaling_factor).sample
        found: Tensor = (x / 2 + 0.5).clamp(0, 1)
        return found


def check(folder: str) -> None:
    """Raises ConfigError unless the folder holds a pipeline with a UNet and one text encoder."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise ConfigError("task 'text-to-image' needs diffusers: pip install 'veneer[diffusion]'") from None
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ConfigError(f"model: the folder {folder} must hold a pipeline of diffusers; {INDEX} is missing")
    parts = json.loads(path.read_text(encoding="utf-8"))
    kinds = {
        name: (parts.get(name) or [None, None])[1] for name in ("unet", "text_encoder", "vae", "tokenizer")
    }
    missing = [name for name, kind in kinds.items() if kind is None]
    if missing or "text_encoder_2" in parts:
        got = (
            f"{parts.get('_class_name')} without {', '.join(missing)}"
            if missing
            else parts.get("_class_name")
        )
        raise ConfigError(
            "model: task 'text-to-image' trains pipelines like Stable Diffusion 1.5 (unet, one text encoder),"
            f" got {got}; its adapters can be attached, saved and converted, but not trained here yet"
        )
