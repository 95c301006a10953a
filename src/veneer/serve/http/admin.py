"""Models, adapters, tokens and health."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

from veneer.serve.adapters.reading import is_adapter
from veneer.serve.errors import RequestError, Unavailable
from veneer.serve.http import asks, errors
from veneer.serve.http.fields import DetokenizeBody, LoadBody, PinBody, TokenizeBody, UnloadBody
from veneer.serve.http.state import State
from veneer.version import __version__

TEXT: dict[int | str, Any] = {200: {"description": "Done", "content": {"text/plain": {}}}}
STUCK = 300.0  # seconds of one step after which the server is not healthy


class Forbidden(RequestError):
    """Something that the server was not started for."""

    status, code, kind = 403, "loading_disabled", "permission_error"


def router(state: State) -> APIRouter:
    """Returns the routes around the completions."""
    routes = APIRouter()
    for add in (_health, _models, _adapters, _tokens):
        add(routes, state)
    return routes


def _health(routes: APIRouter, state: State) -> None:
    server = state.server

    @routes.get("/health", response_class=Response)
    async def health() -> Response:
        alive = server.supervisor.is_alive and server.supervisor.stuck() < STUCK
        return Response(status_code=200 if alive else 503)

    @routes.get("/ready")
    async def ready() -> Response:
        full = server.engine.queued >= server.options.queue
        if full or server.draining or not server.supervisor.is_alive:
            return errors.response(Unavailable("the server takes no requests now", retry_after=2))
        return JSONResponse({"status": "ready"})

    @routes.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _models(routes: APIRouter, state: State) -> None:
    server, made = state.server, int(time.time())

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        own = [_card(state, None, made), *(_card(state, name, made) for name in server.adapters())]
        return {"object": "list", "data": own}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            server.registry.entry(name)
        return _card(state, None if name == server.name else name, made)


def _adapters(routes: APIRouter, state: State) -> None:
    server = state.server

    @routes.post("/v1/load_lora_adapter", responses=TEXT)
    async def load(body: LoadBody) -> Response:
        _check_loading(state)
        folder = _folder(state, body.lora_path)
        await state.run(lambda: server.load(body.lora_name, folder, replace=body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", responses=TEXT)
    async def unload(body: UnloadBody) -> Response:
        _check_loading(state)
        await state.run(server.unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @routes.post("/v1/pin_lora_adapter", responses=TEXT)
    async def pin(body: PinBody) -> Response:
        _check_loading(state)
        await state.run(server.pin, body.lora_name, body.pinned)
        return PlainTextResponse(
            f"Success: LoRA adapter '{body.lora_name}' {'pinned' if body.pinned else 'unpinned'}."
        )


def _tokens(routes: APIRouter, state: State) -> None:
    server = state.server

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("tokenize needs either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = await state.run(asks.conversation, server.tokenizer, body.messages)
        else:
            tokens = await state.run(server.tokens, body.prompt or "")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.context}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        wrong = [t for t in body.tokens if t >= server.vocabulary]
        if wrong:
            raise RequestError(
                f"tokens must be from 0 to {server.vocabulary - 1}, got {wrong[0]}", param="tokens"
            )
        return {"prompt": await state.run(server.tokenizer.decode, body.tokens)}


def _card(state: State, adapter: str | None, made: int) -> dict[str, Any]:
    """One model's card; an adapter's names its base as parent, and no path of the server."""
    server = state.server
    card: dict[str, Any] = {
        "id": adapter or server.name,
        "object": "model",
        "created": made,
        "owned_by": "veneer",
        "root": adapter or server.name,
        "parent": None if adapter is None else server.name,
        "max_model_len": server.context,
    }
    if adapter is not None:
        entry = server.registry.entry(adapter)
        version = entry.version
        card["veneer"] = {
            "content": None if version is None else version.content,
            "in_bank": version is not None and version.placed is not None,
            "in_memory": version is not None and version.forms is not None,
            "pinned": entry.pinned,
            "error": entry.failure[0] if entry.failure else None,
        }
    return card


def _check_loading(state: State) -> None:
    if not state.loading or state.server.root is None:
        raise Forbidden(
            "adapters cannot be loaded by requests;"
            " start the server with --adapters FOLDER and --allow-loading"
        )


def _folder(state: State, path: str) -> Path:
    """Returns the folder under the root. Raises RequestError for any other, and for one that is not there."""
    root = state.server.root
    assert root is not None
    relative = Path(path)
    inside = not relative.is_absolute() and ".." not in relative.parts and "\0" not in path
    try:
        inside = inside and (root / relative).resolve().is_relative_to(root.resolve())
        there = inside and is_adapter(root / relative)
    except (OSError, UnicodeError):  # a name longer than the file system takes, or with half a character
        there = False
    if not inside:
        raise RequestError(
            "lora_path must be the name of a folder under the adapters' root", param="lora_path"
        )
    if not there:
        error = RequestError(f"lora_path {path!r} holds no adapter", code="not_found", param="lora_path")
        error.status = 404
        raise error
    return root / relative
