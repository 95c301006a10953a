"""Events of the engine as OpenAI's objects: completions and chat completions, whole and in chunks."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from veneer.data.tokenizer import Tokenizer
from veneer.serve.adapters.expression import Named
from veneer.serve.answers import Answer
from veneer.serve.engine.request import Finished, Logprob


class Shape:
    """The objects of one HTTP request: their common fields, and the form of their choices."""

    chat: bool

    def __init__(self, chat: bool, model: str, named: Named, tokenizer: Tokenizer) -> None:
        self.chat, self.tokenizer = chat, tokenizer
        kind = "chat.completion" if chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self.more = {"veneer": {"adapters": [{"name": n, "scale": s} for n, s in named]}}

    def whole(self, answers: Sequence[Answer], echoes: Sequence[str], prompts: int) -> dict[str, Any]:
        """Returns the object of a request that is not streamed.

        echoes: text in front of each answer; prompts: how many different prompts there were, for the usage.
        """
        choices = [
            self.choice(i, echo + a.text, a.reason, (*a.prompt_logprobs, *a.logprobs))
            for i, (a, echo) in enumerate(zip(answers, echoes, strict=True))
        ]
        each = len(answers) // prompts
        counted = usage(
            sum(a.prompt_tokens for a in answers[::each]),
            sum(a.completion_tokens for a in answers),
            sum(a.cached for a in answers[::each]),
        )
        return {**self.head, "choices": choices, "usage": counted, **self.more}

    def choice(self, index: int, text: str, reason: str, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Returns one whole choice."""
        shown = self.logprobs(logprobs)
        if self.chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            return {"index": index, "message": message, "logprobs": shown, "finish_reason": reason}
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": reason}

    def chunk(
        self,
        index: int,
        text: str | None,
        *,
        reason: str | None = None,
        logprobs: Sequence[Logprob] = (),
        first: bool = False,
    ) -> dict[str, Any]:
        """Returns one chunk of a stream. first: the opening one of a chat, which names the role."""
        shown = self.logprobs(logprobs)
        if self.chat:
            delta = (
                {"role": "assistant", "content": ""} if first else {} if text is None else {"content": text}
            )
            choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
            return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **self.more}
        choice = {"index": index, "text": text or "", "logprobs": shown, "finish_reason": reason}
        return {**self.head, "choices": [choice], **self.more}

    def closing(self, ends: Sequence[Finished], prompts: int) -> dict[str, Any]:
        """Returns the last chunk, which has the usage and no choices."""
        each = len(ends) // prompts
        counted = usage(
            sum(e.prompt_tokens for e in ends[::each]),
            sum(e.completion_tokens for e in ends),
            sum(e.cached for e in ends[::each]),
        )
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [], "usage": counted, **self.more}

    def logprobs(self, found: Sequence[Logprob]) -> dict[str, Any] | None:
        """Returns log-probabilities as this kind of completion writes them, None without any."""
        if not found:
            return None
        return self._chat_logprobs(found) if self.chat else self._text_logprobs(found)

    def _chat_logprobs(self, found: Sequence[Logprob]) -> dict[str, Any]:
        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self._text(token)
            return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}

        content = [{**one(p.token, p.logprob), "top_logprobs": [one(*a) for a in p.top]} for p in found]
        return {"content": content, "refusal": None}

    def _text_logprobs(self, found: Sequence[Logprob]) -> dict[str, Any]:
        texts, offsets, at = [self._text(p.token) for p in found], [], 0
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops = [{self._text(a.token): _number(a.logprob) for a in p.top} if p.top else None for p in found]
        return {
            "tokens": texts,
            "token_logprobs": [_number(p.logprob) for p in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Returns the usage object."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else max(value, -9999.0)
