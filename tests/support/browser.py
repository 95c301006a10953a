"""Headless Chromium, driven through its debugging pipe: no driver, no port, no network."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

PATH = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
FLAGS += ("--disable-dev-shm-usage", "--disable-background-networking", "--window-size=1200,900")


class Browser:
    """One page. `events` holds everything that the browser reported meanwhile."""

    def __init__(self, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]  # apart from 3 and 4
        for end in ends:
            os.close(end)
        given, self.write, self.read, taken = high

        def in_place() -> None:  # Chromium reads commands from 3 and writes answers to 4
            os.dup2(given, 3)
            os.dup2(taken, 4)

        command = [str(PATH), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, preexec_fn=in_place, pass_fds=(3, 4), stdout=quiet, stderr=quiet
        )
        os.close(given)
        os.close(taken)
        self.held, self.last = b"", 0
        self.messages: deque[dict[str, Any]] = deque()
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the result of a command."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while not self.messages:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser ended"
            *whole, self.held = (self.held + part).split(b"\0")
            self.messages += map(json.loads, whole)
        return self.messages.popleft()

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30) -> Any:
        """Returns the value of an expression as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {expression}"
            time.sleep(0.05)
        return found

    def press(self, key: str, *, code: int, text: str = "", ctrl: bool = False) -> None:
        """Presses a key."""
        given = dict(key=key, code=key, windowsVirtualKeyCode=code, modifiers=2 if ctrl else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def close(self) -> None:
        """Ends the browser."""
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)
