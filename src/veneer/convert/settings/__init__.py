"""Translates run configurations of other programs; lists settings without a counterpart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import (
    axolotl,
    llamafactory,
    llamafactory_v1,
    mlx,
    preferences,
    torchtune,
    trl,
    unsloth,
)
from veneer.convert.settings.given import Given, Translation, Uncarried
from veneer.errors import ConfigError, suggest

TOOLS = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "llamafactory-v1": llamafactory_v1,
    "torchtune": torchtune,
    "mlx": mlx,
    "trl": trl,
    "unsloth": unsloth,
}

__all__ = ["TOOLS", "Translation", "Uncarried", "tool_of", "translate"]


def tool_of(values: Mapping[str, Any]) -> str:
    """Returns the program with the most of its own keys in `values`.

    Raises ConfigError if that is ambiguous.
    """
    keys = {*values, *Given(values, {}).values}
    found = {name: sum(sign in keys for sign in tool.SIGNS) for name, tool in TOOLS.items()}
    best = max(found, key=lambda name: found[name])
    if not found[best] or list(found.values()).count(found[best]) > 1:
        raise ConfigError(
            "the program that these settings are written for is ambiguous; name it with tool=:"
            f" {', '.join(TOOLS)}"
        )
    return best


def translate(
    values: Mapping[str, Any], tool: str | None = None, *, folder: Path = Path(), layers: int | None = None
) -> Translation:
    """Returns Veneer's settings for those of `tool`; by default the program is detected.

    folder: the file's paths are relative to it. layers: number of layers of the base model, for programs that
    count from the last one. Raises ConfigError for an unknown program and for unsupported kinds of training.
    """
    name = tool or tool_of(values)
    if name in {f"trl-{stage}" for stage in preferences.TRL}:
        return trl.translate(values, name)
    if name not in TOOLS:
        raise ConfigError(f"unknown program {name!r}{suggest(name, TOOLS)}")
    if name == "mlx":
        return mlx.translate(values, folder, layers)
    if name == "llamafactory":
        return llamafactory.translate(values, folder)
    if name == "llamafactory-v1":
        return llamafactory_v1.translate(values, folder)
    plain = {"axolotl": axolotl.translate, "torchtune": torchtune.translate, "trl": trl.translate}
    return {**plain, "unsloth": unsloth.translate}[name](values)
