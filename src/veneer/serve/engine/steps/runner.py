"""The interface between the engine and the model, and the engine's limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Runner(Protocol):
    """Computes steps: packed, or in static batches."""

    static: bool

    def start(self, prompt_tokens: int) -> Any: ...
    def drop(self, held: Any) -> None: ...
    def step(self, works: Any, *, decoding: Any) -> list[Tensor | None]: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine, in requests, tokens and seconds."""

    running: int = 64
    step_tokens: int = 512
    cache_tokens: int = 65536
    context: int = 2048
    patience: float = 5.0  # seconds a request may be passed over before places are drained for it
