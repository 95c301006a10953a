"""Guards in front of the app: keys, sizes, hosts, limits by key, and the id of each request. Plain ASGI."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.http.errors import body

OPEN = ("/health",)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PORT = re.compile(r":\d+$")
DRAINED = 16  # times the limit that is read and thrown away, so that the client gets to read the answer
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Keys:
    """API keys, kept as hashes; each is a tenant. Without keys everyone is the tenant ""."""

    hashes: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """Returns the keys of texts."""
        return cls(tuple(hashlib.sha256(k.encode()).digest() for k in keys))

    def tenant(self, given: str | None) -> str | None:
        """Returns the tenant of a key, or None for an unknown one; the time does not depend on the key."""
        if not self.hashes:
            return ""
        own = hashlib.sha256((given or "").encode("utf-8", "surrogateescape")).digest()
        found = [hmac.compare_digest(own, known) for known in self.hashes]
        return f"key-{found.index(True) + 1}" if any(found) else None


@dataclass
class Allowance:
    """Limits of one tenant: requests at once and in a minute, 0 for no limit."""

    at_once: int = 0
    per_minute: int = 0
    running: dict[str, int] = field(default_factory=dict)
    times: dict[str, deque[float]] = field(default_factory=dict)

    def enter(self, tenant: str) -> tuple[str, float] | None:
        """Counts a request in. Returns (reason, seconds to wait) if it exceeds a limit."""
        now = time.monotonic()
        times = self.times.setdefault(tenant, deque())
        while times and now - times[0] > 60:
            times.popleft()
        if self.per_minute and len(times) >= self.per_minute:
            return f"the limit is {self.per_minute} requests a minute", 60 - (now - times[0])
        if self.at_once and self.running.get(tenant, 0) >= self.at_once:
            return f"the limit is {self.at_once} requests at once", 1.0
        times.append(now)
        self.running[tenant] = self.running.get(tenant, 0) + 1
        return None

    def leave(self, tenant: str) -> None:
        """Counts a request out."""
        self.running[tenant] -= 1


class Guard:
    """The app behind its guards. The tenant is in the scope as `state["tenant"]`."""

    def __init__(
        self, app: Any, *, keys: Keys, allowance: Allowance, most_bytes: int, hosts: Sequence[str]
    ) -> None:
        """hosts: names that the Host header may have; empty for any."""
        self.app, self.keys, self.allowance, self.most_bytes = app, keys, allowance, most_bytes
        self.hosts = tuple(hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        id = headers.get("x-request-id", "")
        id = id if REQUEST_ID.fullmatch(id) else uuid.uuid4().hex

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        await self._guarded(scope, headers, receive, named)

    async def _guarded(self, scope: Any, headers: dict[str, str], receive: Any, send: Any) -> None:
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        tenant = scope["state"]["tenant"]
        counted = scope["method"] == "POST"
        over = self.allowance.enter(tenant) if counted else None
        if over is not None:
            text = body(over[0], code="rate_limit_exceeded", kind="rate_limit_error")
            await _answer(send, 429, text, {"Retry-After": f"{max(1, round(over[1]))}"})
            return
        bounded = _Bounded(receive, send, self.most_bytes)
        try:
            await self.app(scope, bounded, bounded.answer)
        finally:
            if counted:
                self.allowance.leave(tenant)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, Any, dict[str, str]] | None:
        if scope["path"] in OPEN:
            scope.setdefault("state", {})["tenant"] = ""
            return None
        tenant = self.keys.tenant(_key(headers.get("authorization", "")))
        if tenant is None:
            text = body(
                "the API key is missing or unknown", code="invalid_api_key", kind="authentication_error"
            )
            return 401, text, {"WWW-Authenticate": 'Basic realm="veneer", charset="UTF-8"'}
        scope.setdefault("state", {})["tenant"] = tenant
        if self.hosts and PORT.sub("", headers.get("host", "")) not in self.hosts:
            return 403, body("the Host header names another host", code="unknown_host"), {}
        if (
            scope["method"] == "POST"
            and headers.get("content-type", "").partition(";")[0].strip() != "application/json"
        ):
            return 400, body("Content-Type must be application/json", code="invalid_request"), {}
        return None


class _Bounded:
    """receive(), which cuts a body off at `most` bytes, and send(), which then answers 413 whatever the app
    says.
    """

    def __init__(self, receive: Any, send: Any, most: int) -> None:
        self.receive, self.send, self.most, self.read = receive, send, most, 0
        self.answered = False

    async def __call__(self) -> Any:
        message = await self._receive()
        while self.read > self.most and message.get("more_body") and self.read < DRAINED * self.most:
            message = await self._receive()
        if self.read > self.most and message["type"] == "http.request":
            return {"type": "http.request", "body": b"", "more_body": False}
        return message

    async def _receive(self) -> Any:
        message = await self.receive()
        if message["type"] == "http.request":
            self.read += len(message.get("body", b""))
        return message

    async def answer(self, message: Any) -> None:
        if self.read <= self.most:
            await self.send(message)
        elif not self.answered:
            self.answered = True
            text = body(too_large(self.most), code="too_large")
            await _answer(self.send, 413, text, {"connection": "close"})


def too_large(most: int) -> str:
    """Returns the message for a body above the limit."""
    return f"the body must have at most {most} bytes"


def _key(authorization: str) -> str | None:
    """The key of a Bearer header, or the password of a Basic one, which browsers can send."""
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return given.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


async def _answer(send: Any, status: int, content: Any, headers: dict[str, str]) -> None:
    text = json.dumps(content).encode()
    every = {"content-type": "application/json", "content-length": str(len(text)), **headers}
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(k.lower().encode(), v.encode()) for k, v in every.items()]})
    await send({"type": "http.response.body", "body": text})
