"""Requests that wait: in turn between adapters and tenants by the tokens each was served, first come first
served within.

The counters are those of the virtual token counter (Sheng et al. 2024, https://arxiv.org/abs/2401.00588).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Waiting(Generic[T]):
    """Queues by flow. A flow that comes back after a pause gets no credit for it."""

    def __init__(self) -> None:
        self.flows: dict[Hashable, deque[T]] = {}
        self.served: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self.flows.values()))

    def add(self, flow: Hashable, item: T, active: set[Hashable]) -> None:
        """Adds an item at the end of its flow.  active: flows that have running requests."""
        if flow not in self.flows:
            others = [self.served[f] for f in {*self.flows, *active} if f in self.served]
            self.served[flow] = max(self.served.get(flow, 0.0), min(others, default=0.0))
            self.flows[flow] = deque()
        self.flows[flow].append(item)

    def charge(self, flow: Hashable, tokens: float) -> None:
        """Counts tokens that a flow was served."""
        self.served[flow] = self.served.get(flow, 0.0) + tokens

    def heads(self) -> Iterator[tuple[Hashable, T]]:
        """Yields the first item of each flow, least served flow first; safe while items are removed."""
        for flow in sorted(self.flows, key=lambda f: self.served[f]):
            if self.flows.get(flow):
                yield flow, self.flows[flow][0]

    def remove(self, flow: Hashable, item: T) -> None:
        """Removes an item."""
        self.flows[flow].remove(item)
        if not self.flows[flow]:
            del self.flows[flow]

    def items(self) -> list[tuple[Hashable, T]]:
        """Returns all items with their flows."""
        return [(flow, item) for flow, queue in self.flows.items() for item in queue]

    def forget(self, active: set[Hashable]) -> None:
        """Drops the counters of flows that have nothing waiting or running."""
        for flow in [f for f in self.served if f not in self.flows and f not in active]:
            del self.served[flow]
