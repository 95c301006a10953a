"""Answers on their way from the engine's thread to an HTTP client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from starlette.requests import Request

from veneer.serve.adapters.expression import Named
from veneer.serve.engine.request import Event, Failed, Finished, Sampling
from veneer.serve.errors import RequestError
from veneer.serve.server import Server

LOOK = 0.5  # seconds between two looks whether the client is still there


class Ask(NamedTuple):
    """One choice of a request: its prompt and how to go on from there."""

    prompt: list[int]
    sampling: Sampling


class Disconnected(Exception):
    """The client has gone; nobody waits for the answer."""


class Choices:
    """The choices of one HTTP request, each a request of the engine, and their events as they come."""

    def __init__(self, server: Server, pool: ThreadPoolExecutor, seconds: float) -> None:
        self.server, self.pool = server, pool
        self.looked = time.monotonic()
        self.deadline = self.looked + seconds
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.ids: list[str] = []
        self.open = 0

    async def start(self, asks: Sequence[Ask], named: Named, tenant: str, *, special: bool) -> None:
        """Submits all choices. Raises what submitting one raises, after cancelling the others."""
        loop = asyncio.get_running_loop()

        def sink(index: int) -> Any:
            return lambda event: loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        def submit() -> None:
            for index, ask in enumerate(asks):
                id = self.server.submit(
                    ask.prompt, sink(index), ask.sampling, named=named, tenant=tenant, special=special
                )
                self.ids.append(id)

        self.open = len(asks)
        try:
            await loop.run_in_executor(self.pool, submit)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends whatever still runs."""
        for id in self.ids:
            self.server.cancel(id)

    async def each(self, request: Request | None) -> AsyncGenerator[tuple[int, Event], None]:
        """Yields (choice, event) until all choices have ended.

        Raises RequestError for a failed choice and at the time limit, Disconnected when the client of
        `request` has gone. Leaving the loop cancels everything.
        """
        try:
            while self.open:
                try:
                    index, event = await self._next()
                except asyncio.TimeoutError:
                    await self._look(request)
                    continue
                if isinstance(event, Failed | Finished):
                    self.open -= 1
                yield index, event
                if time.monotonic() > self.looked + LOOK:
                    await self._look(request)
        finally:
            if self.open:
                self.cancel()

    async def _next(self) -> tuple[int, Event]:
        if not self.events.empty():
            return self.events.get_nowait()
        return await asyncio.wait_for(self.events.get(), LOOK)

    async def _look(self, request: Request | None) -> None:
        self.looked = time.monotonic()
        if time.monotonic() > self.deadline:
            raise RequestError("the answer took longer than the server's time limit", code="time_limit")
        if request is not None and await request.is_disconnected():
            raise Disconnected
