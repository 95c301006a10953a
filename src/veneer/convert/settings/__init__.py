"""Run configurations of other programs as settings of our Run, with a list of what could not be carried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import axolotl, llamafactory, mlx, torchtune
from veneer.convert.settings.given import Given, Translation, Uncarried
from veneer.errors import ConfigError, suggest

TOOLS = {"axolotl": axolotl, "llamafactory": llamafactory, "torchtune": torchtune, "mlx": mlx}

__all__ = ["TOOLS", "Translation", "Uncarried", "tool_of", "translate"]


def tool_of(values: Mapping[str, Any]) -> str:
    """The program whose settings these are: the one most of whose own words are there. Raises ConfigError for none."""
    keys = {*values, *Given(values, {}).values}
    found = {name: sum(sign in keys for sign in tool.SIGNS) for name, tool in TOOLS.items()}
    best = max(found, key=lambda name: found[name])
    if not found[best] or list(found.values()).count(found[best]) > 1:
        raise ConfigError(
            f"these settings are not clearly of one program; name it with tool=: {', '.join(TOOLS)}"
        )
    return best


def translate(
    values: Mapping[str, Any], tool: str | None = None, *, folder: Path = Path(), layers: int | None = None
) -> Translation:
    """Our settings for those of `tool`, or of the program that they look like.

    folder: against which the file's own paths are read. layers: of the base model, for programs that count from the last
    one. Raises ConfigError for an unknown program, and for trainings that are not done here.
    """
    name = tool or tool_of(values)
    if name not in TOOLS:
        raise ConfigError(f"unknown program {name!r}{suggest(name, TOOLS)}")
    if name == "mlx":
        return mlx.translate(values, folder, layers)
    if name == "llamafactory":
        return llamafactory.translate(values, folder)
    return axolotl.translate(values) if name == "axolotl" else torchtune.translate(values)
