"""Reads pictures as the model's image processor prepares them; needs Pillow, never torchvision."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from torch import Tensor

from veneer.data.media.files import opened
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError

SHOWN = 96  # pixels of the longer side in a report


def read(row: Row, column: str) -> Any:
    """Returns a Pillow picture in RGB. Raises DataError, naming the row, for a file that does not decode."""
    image = _pillow()
    with opened(row, column) as file:
        name = f"{row.where}: the {column} {getattr(file, 'name', 'in it')}"
        try:
            with image.open(file) as found:
                return found.convert("RGB")
        except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as e:
            why = str(e).split(" '")[0].splitlines()[0]
            raise DataError(f"{name} must be a picture that decodes: {why}; replace or remove it") from None


def pixels(processor: Any, picture: Any) -> Tensor:
    """Returns the picture (3, height, width) as the model takes it."""
    found: Tensor = processor(picture, return_tensors="pt")["pixel_values"][0]
    return found


def square(picture: Any, side: int) -> tuple[Tensor, tuple[int, ...]]:
    """Returns the picture's centre (3, side, side), between 0 and 1, and the frame of the cut.

    The shorter side is scaled to `side`. Frame: the picture's height and width, the pixels cut from the top
    and from the left, and the height and width after the cut.
    """
    width, height = picture.size
    scale = side / min(width, height)
    scaled = picture.resize(
        (max(side, round(width * scale)), max(side, round(height * scale))), _pillow().LANCZOS
    )
    left, top = (scaled.size[0] - side) // 2, (scaled.size[1] - side) // 2
    raw = bytearray(scaled.crop((left, top, left + side, top + side)).tobytes())
    x = torch.frombuffer(raw, dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1).float() / 255
    return x, (height, width, top, left, side, side)


def check_processor(processor: Any, task: str) -> None:
    """Raises ConfigError unless the processor prepares pictures."""
    _pillow()
    if not hasattr(processor, "image_mean") and not hasattr(processor, "preprocess"):
        kind = type(processor).__name__
        raise ConfigError(f"task {task!r} needs a model with an image processor, got a {kind}")


def as_uri(x: Tensor, processor: Any = None) -> str:
    """Returns pixels (3, height, width), normalised by the processor, as a data URI of a small PNG."""
    mean, deviation = (
        getattr(processor, n, None) or d for n, d in (("image_mean", [0.0]), ("image_std", [1.0]))
    )
    x = x.float() * torch.tensor(deviation).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    array = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = _pillow().fromarray(array)
    picture.thumbnail((SHOWN, SHOWN))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "pictures need Pillow, which is not installed: pip install 'veneer[images]'"
        ) from None
    return Image
