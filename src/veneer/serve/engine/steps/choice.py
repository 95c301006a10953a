"""Chooses how a model is run: packed if that gives the model's own outputs, in static batches otherwise."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from veneer.adapt.banks.segments import SegmentBank
from veneer.adapt.probe import TOLERANCE
from veneer.errors import ConfigError
from veneer.serve.engine.steps.packed import Packed, Work
from veneer.serve.engine.steps.runner import Runner
from veneer.serve.engine.steps.static import Static

log = logging.getLogger("veneer.serve")
LENGTHS = (9, 5)  # tokens of the two texts that are tried


def runner(model: Any, bank: SegmentBank, engine: str) -> Runner:
    """Returns the runner of the engine "packed", "static" or "auto". Raises ConfigError where packed steps
    fail.
    """
    if engine == "static":
        return Static(model, bank)
    texts = _texts(model)
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([t], device=model.device)).logits[0, -2:] for t in texts]
        packed = Packed(model, bank)
        problem = _problem(packed, texts, expected)
        packed.reset()
    if problem is None:
        return packed
    packed.close()
    if engine == "packed":
        raise ConfigError(f"engine=packed cannot run this model: {problem}; use engine=static")
    log.warning("packed steps cannot run this model (%s); batches are static, and slower", problem)
    return Static(model, bank)


def _texts(model: Any) -> list[list[int]]:
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return [[(1 + 7919 * (i + n)) % vocabulary for i in range(n)] for n in LENGTHS]


def _problem(packed: Packed, texts: list[list[int]], expected: list[Tensor]) -> str | None:
    """Returns a reason not to run the model in packed steps, or None."""
    try:
        found = _tried(packed, texts)
    except Exception as e:  # models fail in ways of their own
        return f"{type(e).__name__}: {str(e)[:200]}"
    dtype = str(expected[0].dtype).removeprefix("torch.")
    limit = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    for own, right in zip(found, expected, strict=True):
        error = float((own - right).abs().max()) / float(right.abs().max())
        if not error <= limit:
            return f"logits differ by {error:.2g} of the largest; {limit:g} is allowed"
    return None


def _tried(packed: Packed, texts: list[list[int]]) -> list[Tensor]:
    """The logits of each text's last two tokens: read in chunks, mixed, and the last as an answer's token."""
    first, second = (packed.start(len(t)) for t in texts)
    packed.step([Work(first, texts[0][:3], (), 0)], decoding=[False])
    read = [Work(first, texts[0][3:-1], (), 1), Work(second, texts[1][:-1], (), 1)]
    before = packed.step(read, decoding=[False, False])
    last = packed.step(
        [Work(first, texts[0][-1:], (), 1), Work(second, texts[1][-1:], (), 1)], decoding=[True, True]
    )
    packed.drop(first)
    packed.drop(second)
    return [torch.cat([a, b]) for a, b in zip(before, last, strict=True) if a is not None and b is not None]
