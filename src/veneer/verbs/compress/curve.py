"""`veneer compress --curve`: quality against parameters, bytes and time for several ratios, beside
quantisation.

Quality is bits per byte and perplexity of texts that were not calibrated on. The formats of quantisation, and
magnitude and Wanda pruning at the bytes of each ratio, are measured on the same windows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.compress.compress import put_blocks
from veneer.compress.folder import weights
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.recipe import Recipe
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.walk import Batch
from veneer.compress.lowrank.work import Work
from veneer.compress.prune import MASK, WAYS, prune
from veneer.compress.quantise import quantise
from veneer.data.pack import Window, n_bytes, n_labels
from veneer.ops.quant import FORMATS
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import nats_by_window

PROMPT, ANSWER, REPEATS = 256, 16, 5


@dataclass(frozen=True)
class Point:
    """One model of the curve. keep: None where it says nothing. seconds: of a prompt's pass, and of a token
    after it.
    """

    name: str
    keep: float | None
    parameters: int
    bytes_: int
    bits_per_byte: float
    perplexity: float
    prefill_seconds: float
    decode_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Setting:
    """A curve's model in float32, in `dtype` when it is measured, its texts and its ratios."""

    model: nn.Module
    dtype: torch.dtype
    batches: Sequence[Batch]
    windows: Sequence[Window]
    keeps: Sequence[float]
    recipe: Callable[[float], Recipe]
    work: Path
    seed: int
    say: Callable[[str], None]


def curve(s: Setting) -> list[Point]:
    """Returns the points: the model itself, quantised, and at every ratio compressed and pruned."""
    found = []
    for name, keep, make in _models(s):
        s.say(f"measuring {name}{'' if keep is None else f' at keep {keep:g}'}")
        found.append(measured(make(), name, keep, s))
    return found


def _models(s: Setting) -> Iterator[tuple[str, float | None, Callable[[], tuple[nn.Module, int]]]]:
    """The models of the curve, each made when it is called for, with the bytes of its weights."""
    yield "dense", None, lambda: _plain(s)
    for format in FORMATS:
        yield format, None, lambda format=format: _quantised(s, format)  # type: ignore[misc]
    for keep in s.keeps:
        yield "low rank", keep, lambda keep=keep: _compressed(s, keep)  # type: ignore[misc]
        for way in WAYS:
            yield way, keep, lambda keep=keep, way=way: _pruned(s, way, keep)  # type: ignore[misc]


def _plain(s: Setting) -> tuple[nn.Module, int]:
    model = copy.deepcopy(s.model).to(s.dtype)
    return model, n_bytes_of(model)


def _quantised(s: Setting, format: str) -> tuple[nn.Module, int]:
    model = quantise(copy.deepcopy(s.model).to(s.dtype), format)
    return model, n_bytes_of(model)


def _compressed(s: Setting, keep: float) -> tuple[nn.Module, int]:
    model, recipe = copy.deepcopy(s.model), s.recipe(keep)
    settings = {**recipe.as_dict(), "seed": s.seed}
    shared = Work(s.work / "survey", {k: settings[k] for k in ("centre", "score", "anchored", "seed")})
    own = Work(s.work / f"keep-{keep:g}", settings)
    job = Job(Held(model, "all-linear", ()), s.batches, recipe, own, s.dtype, s.seed, s.say, shared)
    job.run()
    put_blocks(job.source, own)
    model.to(s.dtype)
    return model, n_bytes_of(model)


def _pruned(s: Setting, way: str, keep: float) -> tuple[nn.Module, int]:
    """The model with as many zeros as make its numbers and a mask take the bytes of the ratio."""
    model = copy.deepcopy(s.model)
    sparsity = min(max(1 - keep + MASK, 0.0), 0.99)
    prune(model, way, sparsity=sparsity, data=s.batches)
    model.to(s.dtype)
    return model, n_bytes_of(model) - round((1 - keep) * _in_blocks(model) * s.dtype.itemsize)


def _in_blocks(model: nn.Module) -> int:
    """Numbers of the linear layers in the model's blocks."""
    source = Held(model, "all-linear", ())
    return sum(
        site.out * site.in_ for i, b in enumerate(source.walk.blocks) for site in source.sites(i, b).values()
    )


def n_bytes_of(model: nn.Module) -> int:
    """Returns the bytes of the model's weights and of the order of pivoted layers, shared ones once."""
    return sum(t.nbytes for t in weights(model).values())


def measured(made: tuple[nn.Module, int], name: str, keep: float | None, s: Setting) -> Point:
    """Returns the point of one model."""
    model, size = made
    nats = float(nats_by_window(model.eval(), s.windows, next_token.nats, batch=4).sum())
    prefill, decode = latencies(model)
    return Point(
        name,
        keep,
        sum({id(p): p.numel() for p in model.parameters()}.values()),
        size,
        nats / math.log(2) / n_bytes(s.windows),
        math.exp(nats / n_labels(s.windows)),
        prefill,
        decode,
    )


@torch.no_grad()
def latencies(model: Any) -> tuple[float, float]:
    """Returns the seconds of a pass over a prompt, and of each token that follows it, the best of a few
    repeats.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROMPT, device=next(model.parameters()).device)[None] % vocabulary
    prefill = decode = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        prefill = min(prefill, time.perf_counter() - start)
        start = time.perf_counter()
        token: Tensor = out.logits[:, -1:].argmax(-1)
        for _ in range(ANSWER):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        decode = min(decode, (time.perf_counter() - start) / ANSWER)
    return prefill, decode
