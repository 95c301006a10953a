"""Runs the app with uvicorn: until a signal, or on a thread of this process."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from typing import Any

import uvicorn

from veneer.errors import ConfigError
from veneer.serve.http.app import app
from veneer.serve.http.guard import LOOPBACK
from veneer.serve.server import Server

log = logging.getLogger("veneer.serve")
HEADER_BYTES = 64 << 10
DRAIN = 30.0  # seconds that running answers get after SIGTERM


def bind(host: str, port: int) -> socket.socket:
    """Returns a listening socket. Raises ConfigError for a port that is in use, or an address that is not
    this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(512)
    except OSError as e:
        found.close()
        raise ConfigError(
            f"--port {port} on {host} cannot be used: {e.strerror}; choose another with --port"
        ) from None
    return found


class _Uvicorn(uvicorn.Server):
    """uvicorn, which first lets the engine's answers end."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.veneer = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.veneer.draining = True
        deadline = time.monotonic() + DRAIN
        while self.veneer.engine.known and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
        self.veneer.draining = False  # the engine may serve on, in this process


def _uvicorn(server: Server, host: str, given: dict[str, Any]) -> _Uvicorn:
    local = host in ("127.0.0.1", "::1", "localhost")
    if local and not given.get("hosts"):
        given["hosts"] = LOOPBACK
    config = uvicorn.Config(
        app(server, **given),
        http="h11",  # the one whose limit on headers holds
        h11_max_incomplete_event_size=HEADER_BYTES,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(DRAIN),
        server_header=False,
    )
    return _Uvicorn(config, server)


def run(server: Server, listening: socket.socket, host: str, **given: Any) -> None:
    """Serves until SIGINT or SIGTERM; then no more requests are taken, and those that run end."""
    _uvicorn(server, host, given).run(sockets=[listening])


class Background:
    """The app on a thread of this process; `url` is where it answers."""

    def __init__(self, server: Server, host: str = "127.0.0.1", port: int = 0, **given: Any) -> None:
        listening = bind(host, port)
        self.port = listening.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self.uvicorn = _uvicorn(server, host, given)
        self.uvicorn.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self.thread = threading.Thread(target=self.uvicorn.run, args=([listening],), daemon=True)
        self.thread.start()
        while not self.uvicorn.started and self.thread.is_alive():
            time.sleep(0.01)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread once its answers have ended."""
        self.uvicorn.should_exit = True
        self.thread.join()
