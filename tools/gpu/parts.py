"""Lists the parts of a round: a function that returns figures, and the seconds that it may take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Figures = dict[str, Any]  # numbers, and under "problems" a list of sentences


class Part(NamedTuple):
    """home: module and function; seconds: its limit on a card; arguments: of the function."""

    home: str
    seconds: int
    arguments: Mapping[str, Any] = {}

    def function(self) -> Callable[..., Figures]:
        module, _, name = self.home.partition(":")
        found: Callable[..., Figures] = getattr(importlib.import_module(module), name)
        return found


# In this order: agreement first, then whole ways, then speed. The limits add up to less than eight minutes.
PARTS = {
    "methods": Part("gpu.agreement:methods", 60),
    "starts": Part("gpu.agreement:starts", 40),
    "optimisers": Part("gpu.agreement:optimisers", 40),
    "compiled": Part("gpu.ways:compiled", 50),
    "graphs": Part("gpu.ways:graphs", 40),
    "loss": Part("gpu.ways:chunked_loss", 15),
    "documents": Part("gpu.ways:documents", 20),
    "checkpointing": Part("gpu.ways:checkpointing", 15),
    "quantised": Part("gpu.ways:quantised", 30),
    "bank": Part("gpu.serving:bank", 20),
    "one_pass": Part("gpu.kernels:one_pass", 35),
    "merge": Part("gpu.serving:merge", 15),
    "generate": Part("gpu.serving:generate", 20),
    "serve": Part("gpu.serving:serve", 25),
    "distributed": Part("gpu.processes:distributed", 25),
    "resume": Part("gpu.resume:resume", 40),
    "steps_h2048": Part("gpu.steps:steps", 80, {"size": "h2048"}),
    "steps_h4096": Part("gpu.steps:steps", 120, {"size": "h4096"}),
}
TOTAL = 480  # seconds


class Skipped(Exception):
    """The part cannot run here; the text is the reason."""
