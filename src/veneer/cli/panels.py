"""Sorts flags into the panels of --help."""

from __future__ import annotations

START, MODEL, METHOD = "To begin with", "Model", "Method"
OPTIMISER, SPEED, OUTPUT, OTHER = "Optimiser", "Speed and memory", "Output", "Options"
ORDER = (START, "Data", MODEL, METHOD, OPTIMISER, "Schedule", "Evaluation", SPEED, OUTPUT, OTHER)

# The ten flags that most runs need.
FIRST = ("config", "data", "model", "method", "rank", "to", "lr", "steps", "batch", "out")


def panel_of(name: str, own: str = "") -> str:
    """Returns the panel of a run's setting or option, `own` if it is not among the first ones."""
    return START if name in FIRST else own or OTHER


def place(panel: str | None) -> int:
    """Returns the panel's place in --help."""
    return ORDER.index(panel) if panel in ORDER else len(ORDER)
