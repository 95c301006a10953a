"""/v1/completions and /v1/chat/completions: whole, or as a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse
from starlette.responses import JSONResponse, Response

from veneer.serve.adapters.expression import Named
from veneer.serve.answers import Answer, collect, failure
from veneer.serve.engine.request import Event, Failed, Finished, Tokens
from veneer.serve.errors import RequestError
from veneer.serve.http import asks, errors
from veneer.serve.http.fields import ChatBody, Common, CompletionBody
from veneer.serve.http.shapes import Shape
from veneer.serve.http.state import State
from veneer.serve.http.streams import Ask, Choices, Disconnected

STREAM: dict[int | str, Any] = {
    200: {"description": "The answer, or its events with stream", "content": {"text/event-stream": {}}}
}
PING = 15  # seconds between comments that keep a silent stream open


def router(state: State) -> APIRouter:
    """Returns both routes."""
    routes = APIRouter()

    @routes.post("/v1/completions", responses=STREAM)
    async def completions(body: CompletionBody, request: Request) -> Response:
        asked = await state.run(asks.of_completion, state.server, body)
        echoes = await state.run(_echoes, state, body, asked)
        prompts = len(asked) // (body.n or 1)
        return await _answer(state, request, body, asked, prompts, echoes)

    @routes.post("/v1/chat/completions", responses=STREAM)
    async def chat(body: ChatBody, request: Request) -> Response:
        asked = await state.run(asks.of_chat, state.server, body)
        return await _answer(state, request, body, asked, 1, [""] * len(asked))

    return routes


def _echoes(state: State, body: CompletionBody, asked: Sequence[Ask]) -> list[str]:
    if not body.echo:
        return [""] * len(asked)
    tokenizer, special = state.server.tokenizer, body.skip_special_tokens
    return [str(tokenizer.decode(a.prompt, skip_special_tokens=special)) for a in asked]


async def _answer(
    state: State, request: Request, body: Common, asked: list[Ask], prompts: int, echoes: list[str]
) -> Response:
    server = state.server
    named = asks.named(server, body)
    shape = Shape(
        isinstance(body, ChatBody), body.model or body.adapter_id or server.name, named, server.tokenizer
    )
    choices = Choices(server, state.pool, state.seconds)
    await choices.start(asked, named, request.state.tenant, special=not body.skip_special_tokens)
    headers = {"x-veneer-adapters": _header(named)}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(choices, shape, echoes, prompts if usage else 0)
        return EventSourceResponse(
            events, headers=headers, sep="\n", ping=PING, send_timeout=state.send_seconds
        )
    try:
        answers = await _whole(choices, request, len(asked))
    except Disconnected:
        return Response(status_code=499)
    return JSONResponse(shape.whole(answers, echoes, prompts), headers=headers)


async def _whole(choices: Choices, request: Request, n: int) -> list[Answer]:
    found: list[list[Event]] = [[] for _ in range(n)]
    async with aclosing(choices.each(request)) as events:
        async for index, event in events:
            if isinstance(event, Failed):
                raise failure(event)
            found[index].append(event)
    return [collect(events) for events in found]


async def _events(
    choices: Choices, shape: Shape, echoes: Sequence[str], usage_of: int
) -> AsyncGenerator[dict[str, str], None]:
    """Yields a stream's events; an error after the beginning is an event too. usage_of: prompts to count, 0
    for no usage.
    """
    ends: dict[int, Finished] = {}
    try:
        for index, echo in enumerate(echoes):
            if shape.chat:
                yield _event(shape.chunk(index, "", first=True))
            elif echo:
                yield _event(shape.chunk(index, echo))
        async with aclosing(choices.each(None)) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    ends[index] = event
                yield _event(_chunk(shape, index, event))
        if usage_of:
            yield _event(shape.closing([ends[i] for i in sorted(ends)], usage_of))
    except RequestError as e:
        yield _event(errors.body_of(e))
    yield {"data": "[DONE]"}


def _chunk(shape: Shape, index: int, event: Event) -> dict[str, Any]:
    if isinstance(event, Failed):
        raise failure(event)
    if isinstance(event, Finished):
        return shape.chunk(index, None, reason=event.reason)
    text = event.text if isinstance(event, Tokens) else ""
    return shape.chunk(index, text, logprobs=event.logprobs)


def _event(content: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(content, ensure_ascii=False)}


def _header(named: Named) -> str:
    return "+".join(f"{n}@{s:g}" for n, s in named)
