"""The engine's loop: admits requests, computes one step for all of them, hands out tokens."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from veneer.data.tokenizer import Tokenizer
from veneer.serve.adapters.slots import Slots
from veneer.serve.engine import sampler
from veneer.serve.engine.door import Broken, Door
from veneer.serve.engine.prefixes import Prefixes, namespace
from veneer.serve.engine.reply import Reply, Request
from veneer.serve.engine.request import Failed
from veneer.serve.engine.stats import Stats
from veneer.serve.engine.steps.packed import Work
from veneer.serve.engine.steps.runner import Limits, Runner

log = logging.getLogger("veneer.serve")
T = TypeVar("T")
LEAST_CHUNK = 32  # prompt tokens in a step, however many answers run


class Engine:
    """Runs requests on one thread. `submit`, `cancel` and `call` are safe from any thread."""

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        limits: Limits,
        prefixes: Prefixes,
    ) -> None:
        """ends: tokens that end an answer."""
        self.runner, self.slots, self.tokenizer, self.ends = runner, slots, tokenizer, ends
        self.limits, self.prefixes = limits, prefixes
        self.door = Door(slots, limits.cache_tokens, limits.patience)
        self.stats = Stats()
        self.reading: list[Reply] = []  # prompts
        self.decoding: list[Reply] = []
        self.known: dict[str, Reply] = {}
        self.inbox: deque[Callable[[], None]] = deque()
        self.wake = threading.Condition()
        self.closing = False
        self.beat = time.monotonic()
        self.arriving = 0  # requests in the inbox

    # From any thread

    def submit(self, request: Request) -> None:
        """Takes a request; its events go to its sink, on the engine's thread."""
        reply = Reply(request, self.tokenizer, random.getrandbits(63))
        with self.wake:
            self.arriving += 1
        self._post(lambda: self._enqueue(reply))

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self.arriving + len(self.door.waiting)

    @property
    def reserved(self) -> int:
        """Tokens of cache that running requests may need."""
        return sum(r.request.reserved for r in self.active)

    def cancel(self, id: str) -> None:
        """Ends a request soon, if it still runs."""
        self._post(lambda: self._mark(id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the engine's thread between two steps."""
        future: Future[T] = Future()
        self._post(lambda: _fulfil(future, function))
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
                if not self.inbox and not self.active:
                    self.wake.wait(0.5)
            self.beat = time.monotonic()
            self.turn()
        for reply in list(self.known.values()):
            reply.finish("cancelled")

    @property
    def active(self) -> list[Reply]:
        """The requests that run."""
        return self.reading + self.decoding

    @torch.inference_mode()
    def turn(self) -> None:
        """One turn of the loop: messages, admissions, a step."""
        while self.inbox:
            self.inbox.popleft()()
        self._drop_cancelled()
        self._admit()
        self.stats.gauge(len(self.active), len(self.door.waiting))
        if self.active:
            self._step()

    def _enqueue(self, reply: Reply) -> None:
        with self.wake:
            self.arriving -= 1
        self.known[reply.request.id] = reply
        self.door.add(reply, self.active)

    def _mark(self, id: str) -> None:
        if id in self.known:
            self.known[id].cancelled = True

    def _drop_cancelled(self) -> None:
        for reply in [r for r in self.known.values() if r.cancelled]:
            reply.finish("cancelled")
            self._forget(reply)

    def _forget(self, reply: Reply) -> None:
        """Takes a request out of wherever it is, and frees what it holds."""
        if self.known.pop(reply.request.id, None) is None:
            return
        self.stats.ended(reply)
        if reply.held is None:
            self.door.withdraw(reply)
            return
        (self.reading if reply in self.reading else self.decoding).remove(reply)
        self.runner.drop(reply.held)
        self.door.leave(reply, self.active)

    def _admit(self) -> None:
        if self.runner.static and self.active:
            return
        while len(self.active) < self.limits.running:
            reply = self.door.next(self.active)
            if reply is None:
                return
            if isinstance(reply, Broken):
                reply.reply.emit(Failed("adapter_invalid", reply.message))
                self.known.pop(reply.reply.request.id, None)
                continue
            reply.held = self.runner.start(len(reply.prompt))
            if not reply.wants_prompt and not self.runner.static:
                reply.cached = self.prefixes.take(_namespace(reply), reply.prompt, reply.held.strip)
                reply.held.length = reply.cached
            self.door.charge(reply, len(reply.prompt) - reply.cached)
            self.reading.append(reply)

    def _step(self) -> None:
        works, owners = self._works()
        began = time.monotonic()
        decoding = len(self.decoding)
        logits = self.runner.step(works, decoding=[i < decoding for i in range(len(works))])
        self.stats.stepped(time.monotonic() - began, works)
        drawing: list[tuple[Reply, Tensor]] = []
        for i, (work, reply, own) in enumerate(zip(works, owners, logits, strict=True)):
            if i < decoding or self._read(reply, work, own):
                assert own is not None
                drawing.append((reply, own[-1]))
        if not drawing:
            return
        stacked = torch.stack([row for _, row in drawing])
        choices = sampler.choose(stacked, [r.draws for r, _ in drawing])
        for (reply, _), choice in zip(drawing, choices, strict=True):
            self.door.charge(reply, 1)
            if reply.take(choice, self.ends, self.limits.context):
                self._forget(reply)

    def _works(self) -> tuple[list[Work], list[Reply]]:
        """The newest token of every answer, and as much of the prompts as the step has room for."""
        works = [Work(r.held, [r.tokens[-1]], r.terms, 1) for r in self.decoding]
        owners = list(self.decoding)
        room = max(self.limits.step_tokens - len(works), min(LEAST_CHUNK, self.limits.step_tokens))
        for r in self.reading:
            start = r.held.length
            n = len(r.prompt) - start if self.runner.static else min(len(r.prompt) - start, room)
            if n <= 0:
                break
            sampled = -1 if r.wants_prompt else int(start + n == len(r.prompt))
            works.append(Work(r.held, r.prompt[start : start + n], r.terms, sampled))
            owners.append(r)
            room -= n
        return works, owners

    def _read(self, reply: Reply, work: Work, logits: Tensor | None) -> bool:
        """Notes a part of a prompt that was read. Returns True if the first token is to be chosen now."""
        if reply.wants_prompt and logits is not None:
            reply.read(logits, reply.held.length - len(work.tokens))
        if reply.held.length < len(reply.prompt):
            return False
        if reply.wants_prompt:
            reply.prompt_read()
        elif not self.runner.static:
            held = reply.held
            self.prefixes.add(_namespace(reply), reply.prompt, held.source, sorted(held.strip.layers))
        if not reply.request.sampling.max_tokens:
            reply.finish("length")
            self._forget(reply)
            return False
        self.reading.remove(reply)
        self.decoding.append(reply)
        return True

    @torch.inference_mode()
    def abandon(self, message: str) -> None:
        """Ends every request with an error and empties all caches, after a step that failed."""
        for reply in list(self.known.values()):
            reply.emit(Failed("engine_failed", message))
            if reply.held is None:
                self.door.withdraw(reply)
            else:
                self.door.leave(reply, ())
        self.known, self.reading, self.decoding = {}, [], []
        self.runner.reset()


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    try:
        future.set_result(function())
    except BaseException as e:
        future.set_exception(e)


def _namespace(reply: Reply) -> bytes:
    request = reply.request
    return namespace([(v.content, s) for v, s in request.adapters], request.tenant)
