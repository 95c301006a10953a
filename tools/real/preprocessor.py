"""Writes the preprocessing of pictures beside a model: size, centre crop, mean and deviation."""

from __future__ import annotations

import json
from pathlib import Path

MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def pictures(out: Path, size: int, shorter_side: int, resample: int) -> None:
    """Writes preprocessor_config.json as transformers reads it. resample: 2 bilinear, 3 bicubic."""
    found = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shorter_side},
        "resample": resample,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": DEVIATION,
        "do_convert_rgb": True,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
