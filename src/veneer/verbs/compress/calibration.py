"""The texts that a compression looks at, as batches of windows drawn by a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer import embedded, tasks
from veneer.data.pack import Window, collate
from veneer.data.reading import Reading
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.ops.draws import keyed
from veneer.runs.texts import sources, texts
from veneer.train.loop.progress import Notes
from veneer.verbs.compress.options import Options

LENGTH = 256  # as of veneer fit
BUILTIN = ("builtin:known:valid",)  # source code that the built-in model has not seen


class Calibration(NamedTuple):
    """batches of input_ids and labels (b, t); sha256 of all tokens."""

    batches: list[dict[str, Tensor]]
    windows: list[Window]
    sha256: str

    def in_batches(self, size: int, device: torch.device) -> list[dict[str, Tensor]]:
        """Returns the windows in batches of another size, or of windows that were replaced."""
        return batches(self.windows, size, device)


def calibration(model: str, s: Options, tokenizer: Tokenizer, device: torch.device) -> Calibration:
    """Returns windows of the texts, drawn by the seed, in batches. Raises ConfigError without texts, and
    DataError.
    """
    names = s.data or (BUILTIN if model == embedded.PREFIX else ())
    if not names:
        raise ConfigError(
            "data must name calibration texts, got none; give files or datasets close to the use"
        )
    windows = windows_of(names, "train", model, s, tokenizer)
    order = torch.randperm(len(windows), generator=keyed(s.seed, "calibration windows")).tolist()
    chosen = [windows[i] for i in (order[: s.samples] if s.samples else order)]
    return Calibration(batches(chosen, s.batch, device), chosen, _digest(chosen))


def windows_of(
    names: Sequence[str], split: str, model: str, s: Options, tokenizer: Tokenizer
) -> Sequence[Window]:
    """Returns all windows of the texts, as long as the settings or the model's context say."""
    context = getattr(pretrained.config(model).get_text_config(), "max_position_embeddings", None) or LENGTH
    length = s.length or min(LENGTH, context)
    reading = Reading(length=length, packing=False, train_on="all", overlong="cut")
    rows = sources.rows(names, split, s.seed)
    return texts.prepare(rows, tasks.build("causal-lm", tokenizer, reading), Notes()).examples


def batches(windows: Sequence[Window], size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Returns the windows in batches; the longest together, so that little is padded."""
    order = sorted(range(len(windows)), key=lambda i: -sum(len(s.inputs) for s in windows[i]))
    ordered = [windows[i] for i in order]
    made = [collate(ordered[i : i + size], 0) for i in range(0, len(ordered), size)]
    return [{k: v.to(device) for k, v in b.items()} for b in made]


def _digest(windows: Sequence[Window]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        for s in window:
            digest.update(s.inputs.numpy().tobytes() + s.labels.numpy().tobytes())
    return digest.hexdigest()
