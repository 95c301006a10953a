"""Reads flags of single messages that keep a turn from being learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.errors import DataError, suggest

# Message keys that other programs read: false or 0 keeps a turn from being learned.
FLAGS = ("weight", "train", "trainable", "loss_weight")
# Keys that look like such a flag but that no format defines; ignoring one would train on the wrong turns.
LOOK_ALIKES = (
    "weights", "training", "trained", "train_on", "learn", "learned", "mask", "masked", "loss", "loss_mask",
    "no_loss", "ignore", "is_train", "supervised", "train_detail",
)  # fmt: skip


def is_learned(message: Mapping[str, Any]) -> bool:
    """Reads the message's flags: any of them false or 0 excludes it."""
    return all(bool(message[name]) for name in FLAGS if message.get(name) is not None)


def check_flags(message: Mapping[str, Any]) -> None:
    """Raises DataError for a flag other than 0, 1, false or true, and for keys that look like a flag."""
    for name in FLAGS:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise DataError(f"{name!r} must be 0, 1, false or true, got {value!r}")
    odd = next((name for name in message if name in LOOK_ALIKES), None)
    if odd is not None:
        raise DataError(f"unknown flag {odd!r}{suggest(odd, FLAGS)}; rename or remove it")
