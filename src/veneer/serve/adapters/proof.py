"""Proves an adapter through the place it will serve from: its probe runs as a request beside all others."""

from __future__ import annotations

import uuid
from concurrent.futures import Future

from torch import Tensor, nn

from veneer.adapt import hooks, probe
from veneer.adapt.probe_inputs import Record
from veneer.adapt.store.effect import refuse_effect
from veneer.adapt.store.loaded import Loaded
from veneer.errors import FormatError
from veneer.serve.adapters.slots import Mixture
from veneer.serve.adapters.version import Version
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.reply import Request
from veneer.serve.engine.request import Event, Failed, Finished, Sampling

NAME = "proof"
SECONDS = 120.0  # until a probe that the engine did not answer has failed


class Prover:
    """Runs probes on an engine."""

    def __init__(self, copy: nn.Module, engine: Engine) -> None:
        """copy: the model with modules of its own, for probes that are more than one text of tokens."""
        self.copy, self.engine = copy, engine

    def __call__(self, version: Version, loaded: Loaded) -> None:
        """Raises FormatError unless the version acts as its probe says, or, without a probe, acts at all."""

        def run(inputs: Record, adapted: bool) -> Tensor:
            tokens = _tokens_of(inputs)
            if tokens is None:
                return self._beside(loaded, inputs, adapted)
            return self._logits(tokens, ((version, 1.0),) if adapted else ())[None]

        refuse_effect(self.copy, loaded, run)

    def _beside(self, loaded: Loaded, inputs: Record, adapted: bool) -> Tensor:
        """Returns the copy's outputs."""
        if adapted:
            hooks.hang(self.copy, NAME, loaded.changes)
        try:
            return probe.through(self.copy, NAME)(inputs, adapted)
        finally:
            if adapted:
                hooks.take_off(self.copy, [NAME])

    def _logits(self, tokens: list[int], adapters: Mixture) -> Tensor:
        """Returns the logits (tokens, vocabulary) of a text, computed by the engine."""
        found: Future[Tensor] = Future()
        for v, _ in adapters:
            v.hold()

        def sink(event: Event) -> None:
            if isinstance(event, Failed) or (isinstance(event, Finished) and event.reason == "cancelled"):
                text = event.message if isinstance(event, Failed) else "the server closed while it was proven"
                if not found.done():
                    found.set_exception(FormatError(text))

        sampling = Sampling(max_tokens=0, temperature=0)
        request = Request(f"probe-{uuid.uuid4().hex}", tokens, adapters, sampling, sink)
        request.all_logits = lambda logits: found.set_result(logits.float().cpu().clone())
        self.engine.submit(request)
        return found.result(SECONDS)


def _tokens_of(inputs: Record) -> list[int] | None:
    """Returns the probe's tokens, if it is one text of nothing but tokens."""
    if set(inputs) != {"input_ids"}:
        return None
    rows = inputs["input_ids"]["values"]
    return [int(t) for t in rows[0]] if len(rows) == 1 else None
