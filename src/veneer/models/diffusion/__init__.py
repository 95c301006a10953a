"""Text-to-image pipelines of diffusers, as one model and one processor."""

from veneer.models.diffusion.model import Diffusion
from veneer.models.diffusion.processor import DiffusionProcessor

__all__ = ["Diffusion", "DiffusionProcessor"]
