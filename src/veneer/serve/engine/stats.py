"""Counts and times of the engine, read by the metrics."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """One finished request's times in seconds and sizes in tokens; NaN for what was not reached."""

    adapters: tuple[str, ...]
    queued: float
    first: float
    total: float
    prompt: int
    cached: int
    completion: int


class Stats:
    """Written by the engine's thread; `drain` hands the finished requests to whoever keeps the histograms."""

    def __init__(self) -> None:
        self.running = self.waiting = self.steps = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.busy = 0.0
        self.by_adapter: Counter[str] = Counter()
        self.ends: deque[Ended] = deque(maxlen=10_000)
        self._lock = threading.Lock()

    def gauge(self, running: int, waiting: int) -> None:
        """Notes how many requests run and wait."""
        self.running, self.waiting = running, waiting

    def stepped(self, seconds: float, works: Sequence[Any]) -> None:
        """Notes a step."""
        self.steps += 1
        self.busy += seconds
        self.prompt_tokens += sum(len(w.tokens) for w in works)

    def ended(self, s: Any) -> None:
        """Notes the end of a request."""
        if s.request.all_logits is not None:
            return  # a probe
        now = time.monotonic()
        names = tuple(v.name for v, _ in s.request.adapters)
        self.generated_tokens += len(s.tokens)
        self.by_adapter.update(dict.fromkeys(names, len(s.tokens)))
        first = s.first - s.arrived if not math.isnan(s.first) else math.nan
        end = Ended(
            names, s.admitted - s.arrived, first, now - s.arrived, len(s.prompt), s.cached, len(s.tokens)
        )
        with self._lock:
            self.ends.append(end)

    def drain(self) -> list[Ended]:
        """Returns the requests that ended since the last call."""
        with self._lock:
            found = list(self.ends)
            self.ends.clear()
        return found
