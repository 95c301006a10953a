"""Proves an adapter through the place it will serve from: its golden probe runs as a request beside all
others.
"""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt import probe as golden
from veneer.adapt.probe_inputs import default_inputs
from veneer.errors import FormatError
from veneer.serve.adapters.slots import Mixture
from veneer.serve.adapters.version import Version
from veneer.serve.engine.engine import Engine
from veneer.serve.engine.reply import Request
from veneer.serve.engine.request import Event, Failed, Sampling

SECONDS = 120.0  # until a probe that the engine did not answer has failed


class Prover:
    """Runs probes on an engine."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.engine = engine
        found = default_inputs(model)
        self.tokens: list[int] | None = None if found is None else found["input_ids"][0].tolist()
        self.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        self.base: Tensor | None = None

    def __call__(self, version: Version, probe: dict[str, Any] | None) -> None:
        """Raises FormatError unless the version acts as its probe says, or, without a probe, acts at all."""
        tokens = _tokens_of(probe)
        if probe is not None and tokens is not None:
            self._compare(self._logits(tokens, ((version, 1.0),)), probe)
            return
        if self.tokens is None:
            return
        if self.base is None:
            self.base = self._logits(self.tokens, ())
        own = self._logits(self.tokens, ((version, 1.0),))
        if not bool(own.isfinite().all()):
            raise FormatError("the model's outputs with it are not finite")
        if torch.equal(own, self.base):
            raise FormatError("the model's outputs with it are those of the base, bit for bit")

    def _compare(self, logits: Tensor, probe: dict[str, Any]) -> None:
        kept = torch.tensor(probe["on"])
        if [1, *logits.shape] != probe["shape"]:
            raise FormatError(
                f"probe: outputs have shape {[1, *logits.shape]}, {probe['shape']} were kept with it"
            )
        tolerance = max(
            golden.TOLERANCE.get(d, golden.TOLERANCE["bfloat16"]) for d in (probe["dtype"], self.dtype)
        )
        limit = tolerance * float(torch.tensor(probe["off"] + probe["on"]).abs().max())
        error = float((logits.reshape(-1)[probe["where"]].cpu() - kept).abs().max())
        if not error <= limit:
            raise FormatError(
                f"probe: served outputs are {error:.2g} from those kept with it; {limit:.2g} is allowed"
            )

    def _logits(self, tokens: list[int], adapters: Mixture) -> Tensor:
        """Returns the logits (tokens, vocabulary) of a text, computed by the engine."""
        found: Future[Tensor] = Future()
        for v, _ in adapters:
            v.hold()

        def sink(event: Event) -> None:
            if isinstance(event, Failed) and not found.done():
                found.set_exception(FormatError(event.message))

        self.engine.submit(
            Request(
                f"probe-{uuid.uuid4().hex}",
                tokens,
                adapters,
                Sampling(max_tokens=0, temperature=0),
                sink,
                all_logits=lambda logits: found.set_result(logits.clone()),
            )
        )
        return found.result(SECONDS)


def _tokens_of(probe: dict[str, Any] | None) -> list[int] | None:
    """The probe's tokens, where it is one text of nothing but tokens."""
    if probe is None or set(probe["inputs"]) != {"input_ids"}:
        return None
    rows = probe["inputs"]["input_ids"]["values"]
    return [int(t) for t in rows[0]] if len(rows) == 1 else None
