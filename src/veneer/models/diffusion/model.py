"""A text-to-image pipeline as one model, from a folder of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.diffusion import opening
from veneer.models.diffusion.kind import Kind


class Diffusion(nn.Module):
    """The parts that adapters change, under diffusers' names, such as unet and text_encoder."""

    def __init__(self, kind: Kind, parts: dict[str, nn.Module], name: str) -> None:
        super().__init__()
        self.kind, self.name_or_path = kind, name
        for part, module in parts.items():
            setattr(self, part, module)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        *,
        dtype: torch.dtype = torch.float32,
        output_loading_info: bool = False,
        trust_remote_code: bool = False,
    ) -> Any:
        """Returns the model, and if asked the names of missing weights. Raises ConfigError."""
        kind = opening.kind(folder, trust_remote_code)
        parts: dict[str, nn.Module] = {}
        missing: list[str] = []
        for name, made in kind.PARTS.items():
            key = "dtype" if name.startswith("text_encoder") else "torch_dtype"
            options = {key: dtype, "output_loading_info": True}
            parts[name], info = opening.part(folder, name, made, **options)
            missing += info["missing_keys"]
        found = cls(kind, parts, folder)
        return (found, {"missing_keys": missing, "mismatched_keys": []}) if output_loading_info else found

    @classmethod
    def skeleton(cls, folder: str) -> Diffusion:
        """Returns the model on the meta device: names and shapes. Raises ConfigError."""
        kind = opening.kind(folder)
        parts = {name: opening.skeleton(folder, name, made) for name, made in kind.PARTS.items()}
        return cls(kind, parts, folder)

    def forward(self, latents: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """Returns the prediction (b, c, h, w) for latents, timesteps (b,) and captions: ids (b, n), .."""
        return self.kind.prediction(self, latents, timesteps, self.kind.states(self, conditions))
