"""Admission: requests wait here until their adapters, their cache and the batch have room."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from veneer.serve.adapters.slots import Slots
from veneer.serve.adapters.version import Version
from veneer.serve.engine.reply import Reply
from veneer.serve.engine.waiting import Waiting


class Broken(NamedTuple):
    """A request whose adapter could not be read, and why."""

    reply: Reply
    message: str


class Door:
    """Chooses who comes next: the least served flow whose request fits.

    A request that was passed over for longer than `patience` seconds comes first: places of the bank are
    drained for its adapters, and nothing overtakes it where it waits for cache.
    """

    def __init__(self, slots: Slots, cache_tokens: int, patience: float) -> None:
        self.slots, self.cache_tokens, self.patience = slots, cache_tokens, patience
        self.waiting: Waiting[Reply] = Waiting()
        self.fetch: Callable[[Version], None] | None = None  # starts to read a version's forms

    def add(self, reply: Reply, active: Sequence[Reply]) -> None:
        """Adds a request, which holds its adapters, and starts to read those that are on the disk only."""
        self.waiting.add(reply.request.flow, reply, {r.request.flow for r in active})
        self._absent(reply)

    def withdraw(self, reply: Reply) -> None:
        """Removes a request that waits."""
        self.waiting.remove(reply.request.flow, reply)
        for v, _ in reply.request.adapters:
            v.hold(-1)

    def charge(self, reply: Reply, tokens: int) -> None:
        """Counts tokens that a request was served."""
        self.waiting.charge(reply.request.flow, tokens)

    def leave(self, reply: Reply, active: Sequence[Reply]) -> None:
        """Frees the adapters of a request that ran."""
        self.slots.release(reply.request.adapters)
        self.waiting.forget({r.request.flow for r in active})

    def next(self, active: Sequence[Reply]) -> Reply | Broken | None:
        """Returns the next request, which holds its adapters from now on, or one that is broken; None if all
        must wait.
        """
        used = sum(r.request.reserved for r in active)
        now = time.monotonic()
        for _, reply in self.waiting.heads():
            absent = self._absent(reply)
            error = next((v.error for v in absent if v.error is not None), None)
            if error is not None:
                self.withdraw(reply)
                return Broken(reply, error)
            fits = used + reply.request.reserved <= self.cache_tokens
            terms = self.slots.acquire(reply.request.adapters) if fits and not absent else None
            if terms is not None:
                reply.terms, reply.admitted = terms, now
                self.withdraw(reply)
                return reply
            if now - reply.arrived > self.patience and not absent:
                if not fits:
                    return None
                self.slots.drain([v for v, _ in reply.request.adapters])
        return None

    def _absent(self, reply: Reply) -> list[Version]:
        """The adapters that are not in memory; they are being read from now on."""
        absent = [v for v, _ in reply.request.adapters if v.placed is None and v.forms is None]
        for v in absent:
            if v.error is None and self.fetch is not None:
                self.fetch(v)
        return absent
