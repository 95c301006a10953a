"""The server and its threads, shared by all routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from veneer.serve.server import Server

T = TypeVar("T")


@dataclass
class State:
    """The server behind the routes, and threads for work that must not hold up the event loop.

    seconds: the longest that an answer may take; send_seconds: the longest that a client may take to read a
    part of it; loading: adapters may be loaded and unloaded by requests.
    """

    server: Server
    seconds: float = 600.0
    send_seconds: float = 60.0
    loading: bool = False
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32, "veneer-http"))

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: function(*args))
