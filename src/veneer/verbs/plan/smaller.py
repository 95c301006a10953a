"""Finds the settings that would halve a step's memory: halves each until it does, by shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import methods
from veneer.adapt import attach, switch
from veneer.analyse.cost import simulate
from veneer.analyse.cost.simulate import Memory
from veneer.optim.base.groups import of_adapter
from veneer.runs import base_model
from veneer.runs.prepare import NAME, Ready
from veneer.runs.starts import calibration
from veneer.tasks.base.abilities import Outlined
from veneer.tasks.base.shape import Shape
from veneer.train.run import Run
from veneer.train.speed import compiling
from veneer.verbs.plan import room

TRIAL = "trial"  # the name of an adapter that exists for a moment
MOST = 3  # halvings of one setting


class Trial(NamedTuple):
    """A changed setting, as flags, and the peak over the unchanged one's."""

    setting: str
    change: str
    share: float

    @property
    def halves(self) -> bool:
        """Returns True if at most half of the memory is left."""
        return self.share <= 0.5


def halving(ready: Ready, shape: Shape, now: Memory) -> list[Trial]:
    """Returns one trial for every setting that can shrink, those that halve by the mildest change first."""
    found = []
    for setting in (_recompute, _batch, _precision, _length, _rank):
        last = None
        for times, trial, memory in setting(ready, shape, now):
            last = times, trial._replace(share=memory.peak / now.peak)
            if last[1].halves:
                break
        if last:
            found.append(last)
    return [t for _, t in sorted(found, key=lambda f: (not f[1].halves, f[0] if f[1].halves else f[1].share))]


Trials = Iterator[tuple[int, Trial, Memory]]  # times halved


def _recompute(ready: Ready, shape: Shape, now: Memory) -> Trials:
    run = ready.run
    if run.gradient_checkpointing or run.stream_base or not ready.model.supports_gradient_checkpointing:
        return
    with compiling.recomputing(ready.model):
        change = "--gradient-checkpointing, a third more time,"
        yield 1, Trial("gradient_checkpointing", change, 1.0), _memory(ready, shape)


def _batch(ready: Ready, shape: Shape, now: Memory) -> Trials:
    run = ready.run
    most = min(MOST, shape.rows.bit_length() - 1)
    # Weights do not shrink with the batch: half of the rows alone never takes half of the memory.
    first = 2 if most > 1 and shape.rows % 2 == 0 else 1
    for i in range(first, most + 1):
        rows, passes = shape.rows >> i, shape.passes << i
        smaller = shape._replace(rows=rows, labels=max(1, shape.labels >> i), passes=passes)
        change = f"--batch {rows} --accumulate {run.accumulate << i}"
        yield i, Trial("batch", change, 1.0), _memory(ready, smaller)


def _length(ready: Ready, shape: Shape, now: Memory) -> Trials:
    if "length" not in ready.task.SETTINGS:
        return
    for i in range(1, MOST + 1):
        tokens = shape.tokens >> i
        if tokens < 2:
            return
        smaller = shape._replace(tokens=tokens, labels=max(1, shape.labels >> i))
        yield i, Trial("length", f"--length {tokens}", 1.0), _memory(ready, smaller)


def _precision(ready: Ready, shape: Shape, now: Memory) -> Trials:
    if ready.run.precision == "fp32":
        yield 1, Trial("precision", "--precision bf16", 1.0), _memory(ready, shape, narrow=True)


def _rank(ready: Ready, shape: Shape, now: Memory) -> Trials:
    run = ready.run
    known = methods.options_of(methods.get(run.method))
    if run.trains_base or "rank" not in known:
        return
    rank = int(run.options.get("rank", known["rank"].default))
    most = min(MOST, rank.bit_length() - 1)
    if 2 * (now.adapter + now.gradients + now.optimiser) < now.peak:
        return  # without any rank more than half of the memory would be left
    for i in range(1, most + 1):
        smaller = replace(
            run,
            options={**run.options, "rank": rank >> i},
            rank_pattern={k: max(1, r >> i) for k, r in run.rank_pattern.items()},
        )
        with _instead(ready.model, smaller):
            memory = _memory(ready._replace(parts=of_adapter(ready.model, TRIAL)), shape)
        yield i, Trial("rank", f"--rank {rank >> i}", 1.0), memory


def _memory(ready: Ready, shape: Shape, *, narrow: bool = False) -> Memory:
    full, bf16 = ready.run.trains_base, narrow or ready.run.precision == "bf16"
    base = torch.bfloat16 if narrow and not full else None
    states = ready.optimiser.state_bytes(ready.trained)
    assert isinstance(ready.task, Outlined)  # checked at the start of the plan
    own: dict[str, Any] = {"full": full, "base": base, "autocast": full and bf16, "states": states}
    return room.in_memory(ready.model, simulate.step(ready.model, shape, ready.task, **own).memory)


@contextmanager
def _instead(model: nn.Module, run: Run) -> Iterator[None]:
    """Lets another adapter act within the block, that of `run`."""
    layers: dict[str, Any] = {
        name: getattr(run, name) for name in ("to", "exclude", "untie", "rank_pattern", "alpha_pattern")
    }
    stats = calibration.unseen(model, run) if calibration.needed(run) else None
    # The start is left out where it needs a base of its own: the adapter has one size with all of them.
    options = {k: v for k, v in run.options.items() if k != "init" or base_model.start_of(run) is None}
    attach.attach(model, run.method, name=TRIAL, stats=stats, **layers, **options)
    try:
        with switch.using(model, TRIAL):
            yield
    finally:
        attach.detach(model, TRIAL)
        switch.train_only(model, NAME)
