"""Sizes of a VAE."""

from __future__ import annotations

from typing import Any


def scale(vae: Any) -> int:
    """Returns the pixels of a latent's side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))
