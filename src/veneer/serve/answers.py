"""Events of a request put together: a whole answer, or the error that ended it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from veneer.serve.engine.request import Event, Failed, Logprob, Prompt, Tokens
from veneer.serve.errors import ENGINE_STATUS, RequestError


class Answer(NamedTuple):
    """A finished answer. reason: "stop" or "length"; completion_tokens: with an end token, which `tokens`
    lacks.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached: int
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


def failure(event: Failed) -> RequestError:
    """Returns the error of a request that the engine could not complete."""
    error = RequestError(event.message, code=event.code)
    error.status = ENGINE_STATUS.get(event.code, 503)
    error.kind = "server_error" if error.status >= 500 else error.kind
    return error


def collect(events: Iterable[Event]) -> Answer:
    """Returns the answer that events make up. Raises RequestError for one that failed."""
    parts: list[Tokens] = []
    prompt: tuple[Logprob, ...] = ()
    for event in events:
        if isinstance(event, Tokens):
            parts.append(event)
        elif isinstance(event, Prompt):
            prompt = event.logprobs
        elif isinstance(event, Failed):
            raise failure(event)
        else:
            return Answer(
                "".join(p.text for p in parts),
                tuple(t for p in parts for t in p.tokens),
                event.reason,
                event.prompt_tokens,
                event.completion_tokens,
                event.cached,
                tuple(one for p in parts for one in p.logprobs),
                prompt,
            )
    raise RequestError("the answer ended before its time; send the request again")
