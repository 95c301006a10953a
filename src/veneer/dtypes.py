"""Names of number formats: each has a short and a long spelling."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from veneer.errors import ConfigError, suggest

SHORT = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {**SHORT, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def of_name(name: str, others: Iterable[str] = ()) -> torch.dtype:
    """Returns the dtype of either spelling. Raises ConfigError for an unknown name.

    others: further formats that the caller supports, for the suggestion in the error.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown dtype {name!r}{suggest(name, (*NAMES, *others))}")
    return NAMES[name]


def short(dtype: torch.dtype | None) -> str | None:
    """Returns "fp32", "bf16" or "fp16", or None for any other dtype."""
    return next((name for name, d in SHORT.items() if d == dtype), None)


def in_short(name: str) -> str:
    """Returns the short spelling of a name; other texts unchanged."""
    return short(NAMES.get(name)) or name
