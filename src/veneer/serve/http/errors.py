"""Errors in OpenAI's shape, with codes that clients do not retry in vain."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from veneer.errors import VeneerError
from veneer.serve.errors import RequestError

log = logging.getLogger("veneer.serve")
SHOWN, LONGEST = 5, 1000  # problems in one message, characters of each
CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class Problem(BaseModel):
    """Fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class Body(BaseModel):
    """Body of an error, in OpenAI's shape."""

    error: Problem


# The answers that any path may give, for the OpenAPI description.
ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"model": Body, "description": "A value that cannot be served"},
    401: {"model": Body, "description": "The API key is missing or unknown"},
    403: {"model": Body, "description": "Loading is off, or the Host header names another host"},
    404: {"model": Body, "description": "An unknown model, adapter or path"},
    413: {"model": Body, "description": "A body above the limit"},
    422: {"model": Body, "description": "An adapter that cannot be served"},
    429: {"model": Body, "description": "Too many requests; Retry-After says when to try again"},
    503: {"model": Body, "description": "The server is not ready; Retry-After says when to try again"},
}


def body(
    message: str, *, code: str | None, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    """Returns the body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(e: RequestError) -> dict[str, Any]:
    """Returns the body of a refused request."""
    return body(str(e), code=e.code, kind=e.kind, param=e.param)


def response(e: RequestError) -> JSONResponse:
    """Returns the answer to a refused request; Retry-After where waiting helps."""
    headers = {} if e.retry_after is None else {"Retry-After": f"{max(1, round(e.retry_after))}"}
    if e.status < 500 and e.status != 429:
        headers["x-should-retry"] = "false"
    return JSONResponse(body_of(e), e.status, headers)


def install(app: FastAPI) -> None:
    """Has all errors of the app answered in this shape."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, e: RequestError) -> JSONResponse:
        return response(e)

    @app.exception_handler(VeneerError)
    async def wrong(request: Request, e: VeneerError) -> JSONResponse:
        return JSONResponse(body(str(e)[:LONGEST], code="invalid_request"), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> JSONResponse:
        found = e.errors()
        texts = [f"{_place(p['loc'])}: {p['msg']}"[:LONGEST] for p in found[:SHOWN]]
        more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        text = body("; ".join([*texts, *more]), code="invalid_request", param=_place(found[0]["loc"]) or None)
        return JSONResponse(text, 400)

    @app.exception_handler(HTTPException)
    async def status(request: Request, e: HTTPException) -> JSONResponse:
        code = CODES.get(e.status_code, "invalid_request")
        return JSONResponse(body(str(e.detail), code=code), e.status_code, e.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, e: Exception) -> JSONResponse:
        log.exception("unexpected error", exc_info=e)
        text = body("unexpected error; the server's log has it", code="internal_error", kind="server_error")
        return JSONResponse(text, 500)


def _place(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in loc if part != "body")[:200]
