"""A request on its way through the engine, and the answer so far."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.adapt.banks.program import Terms
from veneer.data.tokenizer import Tokenizer
from veneer.serve.adapters.slots import Mixture
from veneer.serve.engine import sampler
from veneer.serve.engine.request import Event, Failed, Finished, Logprob, Prompt, Sampling, Sink, Tokens
from veneer.serve.engine.text import Detokeniser


@dataclass
class Request:
    """A text to continue with a sum of adapters.

    adapters: versions and strengths; tenant: whose request it is; all_logits: a sink for the prompt's logits
    (tokens, vocabulary), for probes.
    """

    id: str
    prompt: Sequence[int]
    adapters: Mixture
    sampling: Sampling
    sink: Sink
    tenant: str = ""
    special: bool = False
    all_logits: Any = None

    @property
    def flow(self) -> tuple[Any, ...]:
        """The queue that the request waits in: of its tenant and its adapters."""
        return self.tenant, *sorted(v.name for v, _ in self.adapters)

    @property
    def reserved(self) -> int:
        """Tokens of cache that the request may need."""
        return len(self.prompt) + self.sampling.max_tokens


class Reply:
    """A request's state: the tokens so far, the cache, the text, and times for the metrics."""

    def __init__(self, request: Request, tokenizer: Tokenizer, seed: int) -> None:
        s = request.sampling
        self.request, self.prompt = request, list(request.prompt)
        self.tokens: list[int] = []
        self.draws = sampler.Draws(s, self.prompt, seed if s.seed is None else s.seed)
        self.text = Detokeniser(tokenizer, s.stop, special=request.special)
        self.held: Any = None
        self.terms: Terms = ()
        self.cached = 0
        self.cancelled = self.ended = False
        self.prompt_logprobs: list[Logprob] = []
        self.logits: list[Tensor] = []
        self.arrived = time.monotonic()
        self.admitted = self.first = self.last = math.nan

    @property
    def wants_prompt(self) -> bool:
        """True if logits of all prompt tokens are wanted."""
        return self.request.sampling.prompt_logprobs or self.request.all_logits is not None

    def emit(self, event: Event) -> None:
        """Hands an event to the request's sink; nothing follows the end of an answer."""
        if self.ended:
            return
        self.ended = isinstance(event, Finished | Failed)
        self.request.sink(event)

    def take(self, choice: sampler.Choice, ends: Collection[int], context: int) -> bool:
        """Takes a chosen token, and emits the text that became certain. Returns True if the answer has
        ended.
        """
        if choice.token is None:
            self.emit(Failed("not_finite", "the model's output is not finite with these adapters"))
            return True
        self.last = time.monotonic()
        self.first = self.last if math.isnan(self.first) else self.first
        s, token = self.request.sampling, choice.token
        self.tokens.append(token)
        self.draws.took(token)
        if token in s.stop_token_ids or (token in ends and not s.ignore_eos):
            self._emit(self.text.finish(), (), ())
            return self.finish("stop")
        text = self.text.add(token)
        over = len(self.tokens) >= s.max_tokens or len(self.prompt) + len(self.tokens) >= context
        if over and not self.text.stopped:
            text += self.text.finish()
        self._emit(text, (token,), () if choice.logprob is None else (choice.logprob,))
        if self.text.stopped:
            return self.finish("stop")
        return self.finish("length") if over else False

    def _emit(self, text: str, tokens: tuple[int, ...], logprobs: tuple[Logprob, ...]) -> None:
        if text or tokens:
            self.emit(Tokens(text, tokens, logprobs))

    def finish(self, reason: str) -> bool:
        """Emits the end. Returns True."""
        self.emit(Finished(reason, len(self.prompt), len(self.tokens), self.cached))
        return True

    def read(self, logits: Tensor, start: int) -> None:
        """Takes the logits of the prompt's tokens from `start` on."""
        if self.request.all_logits is not None:
            self.logits.append(logits.float())
        if not self.request.sampling.prompt_logprobs:
            return
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(Logprob(self.prompt[0], math.nan))
        following = self.prompt[start + 1 : start + 1 + len(logits)]
        values = torch.log_softmax(logits[: len(following)].float(), -1)
        n = self.request.sampling.logprobs or 0
        self.prompt_logprobs += [sampler.report(v, t, n) for v, t in zip(values, following, strict=True)]

    def prompt_read(self) -> None:
        """Emits what was wanted of the prompt, once all of it was read."""
        if self.request.all_logits is not None:
            self.request.all_logits(torch.cat(self.logits))
            self.logits = []
        if self.request.sampling.prompt_logprobs:
            self.emit(Prompt(tuple(self.prompt_logprobs)))
