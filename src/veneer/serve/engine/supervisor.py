"""Keeps the engine's thread alive: a step that fails ends the requests it had, and the next ones are served
again.
"""

from __future__ import annotations

import logging
import threading
import time

from veneer.serve.engine.engine import Engine

log = logging.getLogger("veneer.serve")
PAUSE = 0.1  # seconds between two looks at the thread


class Supervisor:
    """Runs an engine on a thread, and starts another thread where that one has died."""

    def __init__(self, engine: Engine, *, pause: float = 0.5) -> None:
        """pause: seconds between a thread's end and the next one's start, in which the server is not
        healthy.
        """
        self.engine, self.pause = engine, pause
        self.restarts = 0
        self.healthy = False
        self.ending = threading.Event()
        self.worker = self._worker()
        self.guard = threading.Thread(target=self._guard, name="veneer-supervisor", daemon=True)

    def start(self) -> None:
        """Starts the engine."""
        self.worker.start()
        self.healthy = True
        self.guard.start()

    def _worker(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException:
            log.exception("the engine stopped")

    def _guard(self) -> None:
        while not self.ending.wait(PAUSE):
            if self.worker.is_alive() or self.engine.closing:
                continue
            self.healthy = False
            self.engine.abandon("the engine stopped; send the request again")
            self.restarts += 1
            if self.ending.wait(self.pause):
                return
            self.worker = self._worker()
            self.worker.start()
            self.healthy = True

    @property
    def is_alive(self) -> bool:
        """True if the engine answers: its thread runs."""
        return self.healthy and self.worker.is_alive()

    def stuck(self) -> float:
        """Returns seconds since the engine last began a turn."""
        return time.monotonic() - self.engine.beat

    def close(self) -> None:
        """Ends the engine; requests that still run are cancelled."""
        self.ending.set()
        self.engine.close()
        if self.worker.is_alive():
            self.worker.join()
        if self.guard.is_alive():
            self.guard.join()
        self.healthy = False
