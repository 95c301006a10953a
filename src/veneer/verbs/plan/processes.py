"""Forecasts a training in several processes by the base's configuration alone: no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import optim, tasks
from veneer.analyse.cost import simulate
from veneer.analyse.cost.simulate import Memory
from veneer.analyse.cost.wire import Wire, of_process, wire
from veneer.errors import ConfigError, option
from veneer.models import machine, pretrained
from veneer.models.compressed import hollow_model
from veneer.runs import trained
from veneer.runs.decide import decided
from veneer.sites.blocks import blocks
from veneer.sites.own import is_own
from veneer.tasks.base.shape import Shape
from veneer.train.run import Run
from veneer.train.speed import compiling
from veneer.units import size

TOKENS = 1024  # of an example where the run leaves its length open


@dataclass(frozen=True)
class Processes:
    """Forecast for one of several processes. flops: operations of its step; wire: bytes that it exchanges."""

    run: Run
    processes: int
    base: int
    trained: int
    rows: int
    tokens: int
    memory: Memory
    flops: int
    wire: Wire

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        settings = ("model", "method", "optimiser", "precision", "shard")
        own = {name: getattr(self.run, name) for name in settings}
        counts = {n: getattr(self, n) for n in ("processes", "base", "trained", "rows", "tokens", "flops")}
        exchanged = {**self.wire._asdict(), "handed": self.wire.handed}
        return {**own, **counts, "memory_bytes": self.memory._asdict(), "wire_bytes": exchanged}


class Simulated(NamedTuple):
    """One process' step on a whole base. rows: of its pass; frozen: bytes of each block; base: parameters.

    shared: bytes of the optimiser's state in one of so many processes, and of what they exchange for it.
    """

    run: Run
    rows: int
    step: simulate.Step
    frozen: list[int]
    base: int
    trained: int
    shared: Callable[[int], tuple[int, int]]

    def among(self, processes: int, *, shard: bool) -> Processes:
        """Returns the forecast for so many processes with these rows each, on a whole or a divided base."""
        run, step, given = replace(self.run, shard=shard), self.step, {"shard": shard}
        states, factors = self.shared(processes)
        memory = step.memory._replace(
            optimiser=states, peak=step.memory.peak - step.memory.optimiser + states
        )
        return Processes(
            run,
            processes,
            self.base,
            self.trained,
            self.rows,
            run.window,
            of_process(memory, self.frozen, processes, **given),
            step.flops.total,
            wire(memory.gradients, self.frozen, processes, run.accumulate, **given, factors=factors),
        )


def plan_processes(run: Run, processes: int) -> Processes:
    """Returns the forecast for each of `processes` processes of `fit`, from the model's configuration alone.

    One block of each kind is simulated and multiplied, so that 80 layers take seconds. The start of the
    adapter does not count. Raises ConfigError for another task than causal-lm.
    """
    _check(run, processes)
    return simulated(run, math.ceil(run.batch / processes)).among(processes, shard=run.shard)


def simulated(run: Run, rows: int) -> Simulated:
    """Returns the step of a process with `rows` rows in a pass. Raises ConfigError."""
    run = decided(run, machine.device(run.device))
    model, window = hollow_model(pretrained.config(run.model)), run.length
    run = replace(run, length=TOKENS if window == "auto" else window, options=_sized(run.options))
    task: Any = tasks.get(run.task)(None, run)
    model.requires_grad_(False)
    parts = trained.open_parameters(model, run)
    compiling.recompute(model, run.gradient_checkpointing)
    shape = Shape(rows, run.window, rows * run.window, run.accumulate)
    optimiser, own = optim.make(run.optimiser, **run.optimiser_options), trained.for_optimiser(run, parts)
    full, narrow = run.trains_base, run.precision == "bf16"
    step = simulate.step(
        model,
        shape,
        task,
        base=run.base_dtype,
        full=full,
        autocast=full and narrow,
        states=optimiser.state_bytes(own),
    )
    frozen = _blocks(model, task, run.base_dtype)
    base = sum(p.numel() for n, p in model.named_parameters() if not is_own(n))
    return Simulated(
        run,
        rows,
        step,
        frozen,
        base,
        sum(p.parameter.numel() for p in parts),
        lambda n: (optimiser.state_bytes(own, n), optimiser.shared_bytes(own, n)),
    )


def _check(run: Run, processes: int) -> None:
    if processes < 1:
        raise ConfigError(f"{option('world_size')} must be 1 or more, got {processes}")
    if run.stream_base:
        base, size = option("stream_base"), option("world_size")
        raise ConfigError(
            f"{size} plans a base in memory, and {base} leaves it on disk; leave one of them out"
        )
    if run.task != tasks.DEFAULT or run.quantise:
        got = f"task {run.task!r}" if run.task != tasks.DEFAULT else option("quantise", run.quantise)
        raise ConfigError(
            f"{option('world_size')} plans task {tasks.DEFAULT!r} on a plain base, got {got}; leave it out"
        )


def _sized(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options without a start, which would need the weights."""
    return {k: v for k, v in options.items() if k not in ("init", "init_options")}


def _blocks(model: nn.Module, task: Any, dtype: torch.dtype) -> list[int]:
    """Returns the frozen bytes of each block."""
    own = [[p for n, p in block.named_parameters() if not is_own(n)] for block in blocks(task.body(model))]
    return [sum(p.numel() for p in some) * dtype.itemsize for some in own]


def text(found: Processes) -> str:
    """Returns the forecast for people."""
    run, m, w = found.run, found.memory, found.wire
    how = "divided (FSDP2)" if run.shard else "whole in each (DDP)"
    return "\n".join(
        [
            f"{run.model}: {found.base:,} parameters in {run.precision}, {how}, {found.processes} processes",
            f"{run.method} trains {found.trained:,} numbers by {run.optimiser}",
            f"each process: {found.rows} x {found.tokens:,} tokens a pass, {run.accumulate} passes a step,"
            f" {found.flops / 1e9:,.0f} x 10^9 operations",
            f"memory of a process: {size(m.peak)} at the peak; weights {size(m.weights)}, adapter"
            f" {size(m.adapter)}, optimiser {size(m.optimiser)}, kept for the backward {size(m.activations)}",
            f"exchanged by a process and step: {size(w.handed)} handed over, {size(w.sent)} sent in a ring;"
            f" gradients {size(w.gradients)}, blocks {size(w.blocks)}"
            + (f", factors {size(w.factors)}" if w.factors else ""),
        ]
    )
