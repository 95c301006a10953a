"""Takes PEFT's adapter name out of tensor names, which whole state dicts hold and saved adapters do not."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from veneer.errors import FormatError, first_few

# `x.lora_A.default.weight` in a model's state dict is `x.lora_A.weight` in PEFT's own file.
NAMED = re.compile(
    r"(?P<layer>.*\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save))"
    r"\.(?P<adapter>(?!weight$|bias$|lora_)[^.]+)(?P<rest>(?:\..+)?)"
)


def without(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under the names of PEFT's saved files.

    Raises FormatError if they belong to several adapters.
    """
    hits = {k: hit for k in tensors if (hit := NAMED.fullmatch(k))}
    adapters = sorted({hit["adapter"] for hit in hits.values()})
    if len(adapters) > 1:
        raise FormatError(
            f"the file is a state dict with {len(adapters)} adapters ({first_few(adapters)}); save one with"
            " PEFT's save_pretrained"
        )
    # modules_to_save keeps the base's module beside the trained one
    kept = {k: t for k, t in tensors.items() if not (hits and ".original_module." in k)}
    return {_plain(hits[k]) if k in hits else k: t for k, t in kept.items()}


def _plain(hit: re.Match[str]) -> str:
    return f"{hit['layer'].removesuffix('.modules_to_save')}{hit['rest']}"
