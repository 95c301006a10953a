"""Settings of `veneer compress` beside those of the recipe."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from veneer import settings
from veneer.settings import setting

NUMBER = re.compile(r"\s*\d*\.?\d+\s*")


@dataclass(frozen=True, kw_only=True)
class Options(settings.Settings):
    """Settings of the command beside those of the recipe."""

    PANEL = "Options"

    out: str = setting(settings.REQUIRED, "folder of the compressed model; must not exist")
    method: Literal[
        "auto", "fast", "svd", "lord", "svd-llm", "centred", "fisher", "anchored", "allocate", "refine"
    ] = setting(
        "auto", "a published recipe; auto, their combination; or fast, without training: flags replace parts"
    )
    data: tuple[str, ...] = setting((), "calibration texts, as of veneer fit; may be given several times")
    samples: int = setting(256, "windows of the texts, drawn by the seed; 0: all", unit="windows")
    length: int = setting(0, "of a window; 0: 256, or the model's context if shorter", unit="tokens")
    batch: int = setting(4, "windows in one pass", unit="windows")
    to: str | tuple[str, ...] = setting("all-linear", "layers: all-linear, names, endings, or an expression")
    exclude: str | tuple[str, ...] = setting((), "layers that stay dense")
    curve: bool = setting(
        False, "measure quality, bytes and time at several ratios, beside quantisation, and write no model"
    )
    keeps: str = setting("0.9,0.8,0.6,0.4", "ratios of the curve")
    valid: tuple[str, ...] = setting((), "texts that the curve is measured on; a tenth of data unless given")
    expand: bool = setting(False, "write plain dense weights for other programs")
    dtype: str = setting("auto", "of the weights: fp32, bf16, fp16, or auto: as the model is stored")
    device: str = setting("auto", "where to compute: cpu, cuda, or auto")
    seed: int = setting(0, "decides windows, drawn labels and the order of the refinement")
    progress: bool = setting(True, "say what is done")

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range."""
        yield from settings.Range("0 or more", ("samples", "length"), 0).problems(self)
        yield from settings.Range("1 or more", ("batch",), 1).problems(self)
        if any(not 0 < k <= 1 for k in self.ratios()):
            yield f"keeps must be numbers above 0 and at most 1, with commas between them, got {self.keeps!r}"

    def ratios(self) -> list[float]:
        """Returns the ratios of the curve; NaN for other words."""
        return [float(k) if NUMBER.fullmatch(k) else math.nan for k in self.keeps.split(",")]
