"""A server in this process: one base model, any number of adapters, any mixture of them in one batch."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError
from veneer.models import adapted
from veneer.serve.adapters import expression
from veneer.serve.adapters.expression import Named
from veneer.serve.adapters.registry import Registry
from veneer.serve.adapters.watching import Watcher
from veneer.serve.answers import Answer, collect, failure
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.reply import Request
from veneer.serve.engine.request import Event, Failed, Finished, Prompt, Sampling, Sink, Tokens
from veneer.serve.engine.supervisor import Supervisor
from veneer.serve.errors import Overloaded, RequestError, Unavailable
from veneer.serve.options import Options


class Server:
    """Answers requests with any mixture of adapters. Made by `veneer.serve`; safe for threads; close it, or
    use `with`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        options: Options,
        *,
        name: str,
        root: Path | None,
        parts: Parts,
    ) -> None:
        self.model, self.tokenizer, self.options, self.name = model, tokenizer, options, name
        self.engine, self.registry, self.supervisor = parts
        self.context = self.engine.limits.context
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self.root, self.draining = root, False
        self.watcher = None if root is None else Watcher(self.registry, root, options.watch)

    def start(self) -> Server:
        """Starts the engine, and finds the adapters under the root."""
        self.supervisor.start()
        if self.watcher is not None:
            self.watcher.look(first=True)
            if self.options.watch:
                self.watcher.start()
        return self

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # Requests

    def named(self, model: str | None = None, lora: Sequence[Any] | None = None) -> Named:
        """Returns the adapters that a request names. Raises RequestError for what cannot be read, or
        differs.
        """
        names = self.registry.names()
        listed = None if lora is None else expression.of_list(lora, names, self.name)
        given = expression.parse(model or "", names, self.name)
        if listed is not None and given and dict(given) != dict(listed):
            raise RequestError(
                "lora and model name different adapters; send the base's name as model, or lora alone",
                param="lora",
            )
        found = given if listed is None else listed
        for name, _ in found:
            self.registry.entry(name)
        return found

    def submit(
        self,
        prompt: Sequence[int],
        sink: Sink,
        sampling: Sampling,
        *,
        named: Named = (),
        tenant: str = "",
        special: bool = False,
    ) -> str:
        """Takes a request, and returns its id; its events go to `sink`. Waits for adapters that are read for
        the first time.

        Raises RequestError for a prompt or settings that cannot be served, Overloaded if too many requests
        wait.
        """
        self.check(prompt, sampling)
        if self.draining or not self.supervisor.is_alive:
            raise Unavailable("the server is not ready; send the request again", retry_after=2)
        if self.engine.queued >= self.options.queue:
            raise Overloaded(
                f"{self.options.queue} requests wait already; send the request again later", retry_after=1
            )
        mixture = self.registry.resolve(named)
        self.registry.memory.touch(v for v, _ in mixture)
        id = uuid.uuid4().hex
        self.engine.submit(Request(id, prompt, mixture, sampling, sink, tenant, special))
        return id

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises RequestError for a prompt or settings that the engine cannot serve."""
        try:
            sampling.check()
        except ConfigError as e:
            raise RequestError(str(e)) from None
        if not len(prompt):
            raise RequestError("prompt must have at least one token", param="prompt")
        wrong = [t for t in prompt if not 0 <= t < self.vocabulary]
        wrong += [t for t in sampling.logit_bias if not 0 <= t < self.vocabulary]
        if wrong:
            raise RequestError(
                f"tokens must be from 0 to {self.vocabulary - 1}, got {wrong[0]}", param="prompt"
            )
        longest = min(self.context, self.engine.limits.cache_tokens)
        if len(prompt) + sampling.max_tokens > longest or len(prompt) >= longest:
            raise RequestError(
                f"prompt and max_tokens must have at most {longest} tokens together,"
                f" got {len(prompt)} and {sampling.max_tokens}; shorten one",
                code="context_length_exceeded",
                param="prompt",
            )

    def cancel(self, id: str) -> None:
        """Ends a request soon, if it still runs."""
        self.engine.cancel(id)

    def stream(
        self, prompt: str | Sequence[int], model: str | None = None, *, lora: Any = None, **sampling: Any
    ) -> Iterator[Tokens | Prompt | Finished]:
        """Yields the events of one answer as they come; leaving the loop cancels the request.

        prompt: text, or tokens; model, lora: adapters, such as "french@0.75+formal"; sampling: fields of
        Sampling.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        id = self.submit(self.tokens(prompt), events.put, Sampling(**sampling), named=self.named(model, lora))
        done = False
        try:
            while not done:
                event = events.get()
                if isinstance(event, Failed):
                    done = True
                    raise failure(event)
                done = isinstance(event, Finished)
                yield event
        finally:
            if not done:
                self.cancel(id)

    def complete(
        self, prompt: str | Sequence[int], model: str | None = None, *, lora: Any = None, **sampling: Any
    ) -> Answer:
        """Returns the whole answer; arguments as in `stream`.

        >>> server.complete("Bonjour", "french@0.75", max_tokens=8, temperature=0).text
        """
        return collect(self.stream(prompt, model, lora=lora, **sampling))

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Returns the prompt's tokens."""
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]  # check() has its own words
            return ids
        return list(prompt)

    def template(self, named: Named) -> str | None:
        """Returns the chat template saved with an adapter, if exactly one is named and has one."""
        folder = self.registry.entry(named[0][0]).folder if len(named) == 1 else None
        return None if folder is None else adapted.chat_template(folder)

    # Adapters

    def load(self, name: str, folder: str | Path, *, replace: bool = False) -> None:
        """Reads, proves and publishes an adapter. Raises RequestError if it cannot be served; nothing changes
        then.
        """
        existing = self.registry.entries.get(name)
        if existing is not None and replace:
            existing.folder, existing.failure = Path(folder), None
            self.registry.reload(existing).result()
            return
        entry = self.registry.add(name, Path(folder))
        try:
            self.registry.ensure(entry).result()
        except BaseException:
            self.registry.entries.pop(name, None)
            raise

    def unload(self, name: str) -> None:
        """Withdraws an adapter; requests that have it end first, then its memory is free."""
        self.registry.unload(name)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter's place in the bank, or gives it free."""
        self.registry.pin(name, pinned)

    def adapters(self) -> list[str]:
        """Returns the adapters' names."""
        return self.registry.names()

    def drain(self, seconds: float = 30.0) -> None:
        """Takes no more requests, and waits for those that run."""
        self.draining = True
        deadline = threading.Event()
        for _ in range(int(seconds / 0.05)):
            if not self.engine.known and not self.engine.inbox:
                return
            deadline.wait(0.05)

    def close(self) -> None:
        """Ends the server; requests that still run are cancelled. The model is then as it was."""
        self.draining = True
        if self.watcher is not None:
            self.watcher.close()
        self.registry.close()
        self.supervisor.close()
        with torch.inference_mode():
            self.engine.slots.bank.close()
        close = getattr(self.engine.runner, "close", None)
        if close is not None:
            close()


class Parts(NamedTuple):
    """Parts that a server is built from."""

    engine: Engine
    registry: Registry
    supervisor: Supervisor
