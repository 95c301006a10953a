"""The app: routes behind guards."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from veneer.serve.http import admin, completions, errors, metrics
from veneer.serve.http.guard import Allowance, Guard, Keys
from veneer.serve.http.state import State
from veneer.serve.server import Server
from veneer.version import __version__

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def app(
    server: Server,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    loading: bool = False,
    body_bytes: int = 8 << 20,
    seconds: float = 600.0,
    send_seconds: float = 60.0,
    at_once: int = 0,
    per_minute: int = 0,
) -> Any:
    """Returns the server as an ASGI app.

    keys: API keys, each a tenant; hosts: names that the Host header may have, any if empty; loading: requests
    may load and unload adapters; body_bytes: of a request; seconds: of an answer; send_seconds: that a client
    may take to read a part of it; at_once, per_minute: requests of one key, 0 for no limit.
    """
    state = State(server, seconds, send_seconds, loading)
    made = FastAPI(
        title="Veneer", version=__version__, docs_url=None, redoc_url=None, responses=errors.ANSWERS
    )
    errors.install(made)
    for part in (completions, admin, metrics):
        made.include_router(part.router(state))
    made.get("/", include_in_schema=False)(_page)
    return Guard(
        made, keys=Keys.of(keys), allowance=Allowance(at_once, per_minute), most_bytes=body_bytes, hosts=hosts
    )


async def _page() -> Response:
    text = resources.files("veneer.serve.http").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return HTMLResponse(text, headers=headers)
