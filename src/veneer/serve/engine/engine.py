"""The engine's loop: admits requests, computes one step for all of them, hands out tokens."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from veneer.serve.adapters.slots import Slots
from veneer.serve.adapters.version import Version
from veneer.serve.engine import sampler
from veneer.serve.engine.packed import Work
from veneer.serve.engine.prefixes import Prefixes, namespace
from veneer.serve.engine.request import Failed
from veneer.serve.engine.sequence import Request, Sequence_
from veneer.serve.engine.stats import Stats
from veneer.serve.engine.waiting import Waiting

log = logging.getLogger("veneer.serve")
T = TypeVar("T")


class Runner(Protocol):
    """Computes steps: packed, or in static batches."""

    static: bool

    def start(self, prompt_tokens: int) -> Any: ...
    def drop(self, held: Any) -> None: ...
    def step(self, works: Any, *, decoding: Any) -> list[Tensor | None]: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine, in requests, tokens and seconds."""

    running: int = 64
    step_tokens: int = 512
    cache_tokens: int = 65536
    context: int = 2048
    patience: float = 5.0  # seconds a request may be passed over before places are drained for it


class Engine:
    """Runs requests on one thread. `submit`, `cancel` and `call` are safe from any thread."""

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        tokenizer: Any,
        ends: frozenset[int],
        limits: Limits,
        prefixes: Prefixes,
        fetch: Callable[[Version], None] | None = None,
    ) -> None:
        """ends: tokens that end an answer. fetch: starts to read a version's forms, which may take a while."""
        self.runner, self.slots, self.tokenizer, self.ends = runner, slots, tokenizer, ends
        self.limits, self.prefixes, self.fetch = limits, prefixes, fetch
        self.stats = Stats()
        self.waiting: Waiting[Sequence_] = Waiting()
        self.reading: list[Sequence_] = []  # prompts
        self.decoding: list[Sequence_] = []
        self.known: dict[str, Sequence_] = {}
        self.inbox: deque[Callable[[], None]] = deque()
        self.wake = threading.Condition()
        self.closing = False
        self.beat = time.monotonic()

    # From any thread

    def submit(self, request: Request) -> None:
        """Takes a request; its events go to its sink, on the engine's thread."""
        sequence = Sequence_(request, self.tokenizer, random.getrandbits(63))
        self._post(lambda: self._enqueue(sequence))

    def cancel(self, id: str) -> None:
        """Ends a request soon, if it still runs."""
        self._post(lambda: self._mark(id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the engine's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as e:
                future.set_exception(e)

        self._post(run)
        return future

    def _post(self, function: Callable[[], None]) -> None:
        with self.wake:
            self.inbox.append(function)
            self.wake.notify()

    def close(self) -> None:
        """Lets the loop end after the current step."""
        with self.wake:
            self.closing = True
            self.wake.notify()

    # On the engine's thread

    def run(self) -> None:
        """The loop, until close()."""
        while not self.closing:
            with self.wake:
                if not self.inbox and not self.is_busy:
                    self.wake.wait(0.5)
            self.beat = time.monotonic()
            self.turn()

    @property
    def is_busy(self) -> bool:
        """True if a step has work."""
        return bool(self.reading or self.decoding)

    @torch.inference_mode()
    def turn(self) -> None:
        """One turn of the loop: messages, admissions, a step."""
        while self.inbox:
            self.inbox.popleft()()
        self._drop_cancelled()
        self._admit()
        self.stats.gauge(len(self.reading) + len(self.decoding), len(self.waiting))
        if self.is_busy:
            self._step()

    def _enqueue(self, sequence: Sequence_) -> None:
        request = sequence.request
        for v, _ in request.adapters:
            v.waiting += 1
        self.known[request.id] = sequence
        self.waiting.add(request.flow, sequence, {s.request.flow for s in self._active()})

    def _active(self) -> list[Sequence_]:
        return self.reading + self.decoding

    def _mark(self, id: str) -> None:
        if id in self.known:
            self.known[id].cancelled = True

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.known.values() if s.cancelled]:
            sequence.finish("cancelled")
            self._forget(sequence)

    def fail(self, sequence: Sequence_, code: str, message: str) -> None:
        """Ends a request with an error."""
        sequence.emit(Failed(code, message))
        self._forget(sequence)

    def _forget(self, sequence: Sequence_) -> None:
        """Takes a request out of wherever it is, and frees what it holds."""
        request = sequence.request
        if self.known.pop(request.id, None) is None:
            return
        self.stats.ended(sequence)
        if sequence.held is None:
            self.waiting.remove(request.flow, sequence)
            for v, _ in request.adapters:
                v.waiting -= 1
            return
        (self.reading if sequence in self.reading else self.decoding).remove(sequence)
        self.runner.drop(sequence.held)
        self.slots.release(request.adapters)
        self.waiting.forget({s.request.flow for s in self._active()})

    def _admit(self) -> None:
        if self.runner.static and self._active():
            return
        now, admitted = time.monotonic(), True
        while admitted and len(self._active()) < self.limits.running:
            admitted = False
            for _, sequence in self.waiting.heads():
                done = self._try(sequence)
                admitted |= done
                if done:
                    break
                if now - sequence.arrived > self.limits.patience and self._is_ready(sequence):
                    self.slots.drain([v for v, _ in sequence.request.adapters])
                    if not self._has_cache(sequence):
                        return  # nothing overtakes a request that waits for cache

    def _is_ready(self, sequence: Sequence_) -> bool:
        return all(v.placed is not None or v.forms is not None for v, _ in sequence.request.adapters)

    def _has_cache(self, sequence: Sequence_) -> bool:
        used = sum(s.request.reserved for s in self._active())
        return used + sequence.request.reserved <= self.limits.cache_tokens

    def _try(self, sequence: Sequence_) -> bool:
        """Admits a request if its adapters, its cache and the batch have room. Returns True if it runs now."""
        request = sequence.request
        absent = [v for v, _ in request.adapters if v.placed is None and v.forms is None]
        for v in absent:
            if self.fetch is not None:
                self.fetch(v)
        if absent or not self._has_cache(sequence):
            return False
        terms = self.slots.acquire(request.adapters)
        if terms is None:
            return False
        sequence.terms = terms
        self.waiting.remove(request.flow, sequence)
        for v, _ in request.adapters:
            v.waiting -= 1
        sequence.admitted = time.monotonic()
        sequence.held = self.runner.start(len(sequence.prompt))
        if not sequence.wants_prompt and not self.runner.static:
            sequence.cached = self.prefixes.take(self._namespace(sequence), sequence.prompt, sequence.held.strip)
            sequence.held.length = sequence.cached
        self.waiting.charge(request.flow, len(sequence.prompt) - sequence.cached)
        self.reading.append(sequence)
        return True

    def _namespace(self, sequence: Sequence_) -> bytes:
        request = sequence.request
        return namespace([(v.content, s) for v, s in request.adapters], request.tenant)

    def _step(self) -> None:
        works, owners = self._works()
        began = time.monotonic()
        logits = self.runner.step(works, decoding=[s in self.decoding for s in owners])
        self.stats.stepped(time.monotonic() - began, works)
        drawing: list[tuple[Sequence_, Tensor]] = []
        for work, sequence, own in zip(works, owners, logits, strict=True):
            if sequence in self.decoding:
                assert own is not None
                drawing.append((sequence, own[-1]))
            elif self._read(sequence, work, own):
                assert own is not None
                drawing.append((sequence, own[-1]))
        if not drawing:
            return
        stacked = torch.stack([row for _, row in drawing])
        choices = sampler.choose(stacked, [s.draws for s, _ in drawing])
        for (sequence, _), choice in zip(drawing, choices, strict=True):
            self.waiting.charge(sequence.request.flow, 1)
            if sequence.take(choice, self.ends, self.limits.context):
                self._forget(sequence)

    def _works(self) -> tuple[list[Work], list[Sequence_]]:
        """The newest token of every answer, and as much of the prompts as the step has room for."""
        works = [Work(s.held, [s.tokens[-1]], s.terms, 1) for s in self.decoding]
        owners = list(self.decoding)
        room = max(self.limits.step_tokens - len(works), min(32, self.limits.step_tokens))
        for s in self.reading:
            start = s.held.length
            n = len(s.prompt) - start if self.runner.static else min(len(s.prompt) - start, room)
            if n <= 0:
                break
            last = start + n == len(s.prompt)
            sampled = -1 if s.wants_prompt else int(last)
            works.append(Work(s.held, s.prompt[start : start + n], s.terms, sampled))
            owners.append(s)
            room -= n
        return works, owners

    def _read(self, sequence: Sequence_, work: Work, logits: Tensor | None) -> bool:
        """Notes a part of a prompt that was read. Returns True if the first token is to be chosen now."""
        if sequence.wants_prompt and logits is not None:
            sequence.read(logits, sequence.held.length - len(work.tokens))
        if sequence.held.length < len(sequence.prompt):
            return False
        if sequence.wants_prompt:
            sequence.prompt_read()
        elif not self.runner.static:
            strip = sequence.held.strip
            self.prefixes.add(self._namespace(sequence), sequence.prompt, sequence.held.source, sorted(strip.layers))
        if not sequence.request.sampling.max_tokens:
            sequence.finish("length")
            self._forget(sequence)
            return False
        self.reading.remove(sequence)
        self.decoding.append(sequence)
        return True

    def abandon(self, message: str) -> None:
        """Ends every request with an error and empties all caches, after a step that failed."""
        for sequence in list(self.known.values()):
            sequence.emit(Failed("engine_failed", message))
            for v, _ in sequence.request.adapters:
                if sequence.held is None:
                    v.waiting -= 1
            if sequence.held is not None:
                self.slots.release(sequence.request.adapters)
        self.known, self.reading, self.decoding, self.waiting = {}, [], [], Waiting()
        self.runner.reset()
