"""`plan`: what a training would take, layer by layer, in memory, operations and time, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.adapt.attach import using
from veneer.adapt.attached import changes, n_base_parameters
from veneer.analyse.cost import process_memory, simulate
from veneer.analyse.cost.simulate import Memory, Shape
from veneer.compress.quantise import as_plain
from veneer.data.order import Order
from veneer.data.pack import Window, n_labels, n_tokens
from veneer.errors import VeneerError
from veneer.models import machine, pretrained
from veneer.ops.matrix.linalg import multiplies_bf16
from veneer.runs import fit as training
from veneer.runs.prepare import FULL, NAME, Ready, prepare
from veneer.train.loop.loop import Pace
from veneer.train.loop.progress import Voice
from veneer.train.run import Run
from veneer.units import size
from veneer.verbs.plan.probe import Measured, measure
from veneer.verbs.plan.smaller import Trial, halving


class NoRoom(VeneerError):
    """The model alone is larger than the memory that is left."""

    exit_code = 3


class Layer(NamedTuple):
    """One adapted layer W (out, in); rank: None where the method has none; share: trained numbers of those of W."""

    site: str
    out: int
    in_: int
    rank: int | None
    trained: int
    share: float


class Length(NamedTuple):
    """How long the training is; tokens without padding, all steps together."""

    steps: int
    tokens: int
    evaluations: int
    batches: int  # of evaluation, all together


@dataclass(frozen=True)
class Plan:
    """Memory in bytes. measured: what a few steps showed, or None without a probe; problem: why it will not fit, or None."""

    run: Run
    layers: list[Layer]
    trained: int
    base: int
    memory: Memory
    full: Memory
    flops: simulate.Flops
    full_flops: simulate.Flops
    length: Length
    measured: Measured | None
    halving: list[Trial]
    cache_frozen: int | None  # bytes on disk
    available: int | None
    problem: str | None

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base's."""
        return self.trained / self.base

    @property
    def growth(self) -> int:
        """Bytes on top of the loaded model: as measured where that could be, else estimated."""
        found = self.measured.growth if self.measured else None
        return self.memory.growth if found is None else found

    @property
    def seconds(self) -> float | None:
        """Of the whole training, its evaluations included; None without a probe."""
        if self.measured is None:
            return None
        return (
            self.length.steps * self.measured.seconds + self.length.batches * self.measured.evaluation_seconds
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        run = self.run
        return {
            **{
                name: getattr(run, name)
                for name in ("model", "method", "device", "precision", "batch", "accumulate", "length")
            },
            "layers": [
                {("in" if k == "in_" else k): v for k, v in layer._asdict().items()} for layer in self.layers
            ],
            "trained_parameters": self.trained,
            "base_parameters": self.base,
            "share": self.share,
            "memory_bytes": {
                run.method: self.memory._asdict(),
                **({} if run.method == FULL else {FULL: self.full._asdict()}),
            },
            "memory_is": "measured" if self.measured else "estimated from shapes",
            "growth_bytes": self.growth,
            "available_bytes": self.available,
            "flops_per_step": {
                **self.flops._asdict(),
                "total": self.flops.total,
                "full_total": self.full_flops.total,
            },
            **self.length._asdict(),
            "probe": self.measured._asdict() if self.measured else None,
            "seconds": self.seconds,
            "halving": [t._asdict() for t in self.halving],
            "cache_frozen_bytes": self.cache_frozen,
            "fits": self.problem is None,
            "problem": self.problem,
        }


def plan(run: Run, *, probe: bool = True, progress: bool = True) -> Plan:
    """What `fit` would take with these settings; nothing is written.

    probe: take five steps on the run's own texts, in memory, for seconds and bytes as they are; without it, or where the
    training would not fit, memory is estimated from shapes. progress: sentences on stderr. Raises the errors of `fit` for
    settings that make no sense, and NoRoom where the model itself does not fit.
    """
    voice, device = Voice(progress), machine.device(run.device)
    _check_weights(run, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        ready = prepare(run, device, voice, only_shapes=True)
        held = process_memory.forget_peak(device)
        order, pace = training.lay_out(ready.run, ready.texts["train"].windows)
        shape = _shape(ready.run, ready.texts["train"].windows, order)
        own, full = _simulated(ready, shape)
        room = process_memory.available(device)
        problem = _problem(ready.run, own.memory.growth, room, device)
        measured = measure(ready, order, pace, held=held) if probe and problem is None else None
        trials = halving(
            ready, shape, own.memory
        )  # afterwards: what it leaves free in the process is no growth of the probe's
    if measured:
        own = own._replace(memory=measured.corrected(own.memory))
    return Plan(
        run=ready.run,
        layers=layers(ready),
        trained=sum(p.parameter.numel() for p in ready.parts),
        base=n_base_parameters(ready.model),
        memory=own.memory,
        full=full.memory,
        flops=own.flops,
        full_flops=full.flops,
        length=_length(ready, order, pace),
        measured=measured,
        halving=trials,
        cache_frozen=ready.frozen.bytes(ready.texts["train"].facts["tokens"]) if ready.frozen else None,
        available=room,
        problem=problem,
    )


def _check_weights(run: Run, device: torch.device) -> None:
    """Raises NoRoom if the model's weights alone are larger than what is left; nothing is loaded to find that out."""
    n, room = pretrained_size(run.model), process_memory.available(device)
    width = 2 if run.method != FULL and training_precision(run, device) == "bf16" else 4
    if n is not None and room is not None and n * width > room:
        raise NoRoom(
            f"model {run.model!r} has {n:,} parameters, {size(n * width)} in {8 * width} bits, and {size(room)} of memory are available on"
            f" {device}; free memory, use a smaller model{', or precision bf16' if width == 4 and run.method != FULL else ''}"
        )


def training_precision(run: Run, device: torch.device) -> str:
    """The precision that the run would have."""
    if run.precision != "auto":
        return run.precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def pretrained_size(name: str) -> int | None:
    """Parameters of a model by its configuration alone, tied ones once; None where that cannot be told."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(pretrained.source(name))
            )
    except (OSError, ValueError, KeyError):  # said better where the model is loaded
        return None
    return sum(p.numel() for p in model.parameters())


def _shape(run: Run, windows: Sequence[Window], order: Order) -> Shape:
    """The largest batch that the training may meet."""
    rows = min(run.batch, order.total)
    tokens = max(n_tokens([w]) for w in windows)
    labels = min(rows * tokens, math.ceil(rows * n_labels(windows) / len(windows)))
    return Shape(
        rows,
        tokens,
        labels,
        min(run.accumulate, math.ceil(order.total / rows)),
        any(len(w) > 1 for w in windows),
    )


def _simulated(ready: Ready, shape: Shape) -> tuple[simulate.Step, simulate.Step]:
    """This method's step, and that of full fine-tuning."""
    narrow = ready.run.precision == "bf16"
    states = ready.optimiser.state_bytes(ready.trained)
    if ready.run.method == FULL:
        own = simulate.step(ready.model, shape, full=True, autocast=narrow, states=states)
        return own, own
    own = simulate.step(ready.model, shape, states=states)
    with using(ready.model), as_plain(ready.model):
        return own, simulate.step(ready.model, shape, full=True, base=torch.float32, autocast=narrow)


def _problem(run: Run, growth: int, room: int | None, device: torch.device) -> str | None:
    if room is None or growth <= room:
        return None
    return (
        f"will not fit: a step takes about {size(growth)} on top of the loaded model, and {size(room)} are available on {device};"
        f" see which setting would halve it"
    )


def layers(ready: Ready) -> list[Layer]:
    """The adapted layers, or the parameters that full fine-tuning trains."""
    if ready.run.method == FULL:
        return [
            Layer(p.name, p.parameter.shape[0], p.parameter[0].numel(), None, p.parameter.numel(), 1.0)
            for p in ready.parts
        ]
    found = []
    for site, delta in changes(ready.model, NAME):
        trained = sum(p.numel() for p in delta.parameters())
        form = delta.factors(site)
        rank = None if form is None else form.A.shape[0]
        found.append(Layer(site.name, site.out, site.in_, rank, trained, trained / (site.out * site.in_)))
    return found


def _length(ready: Ready, order: Order, pace: Pace) -> Length:
    run, windows = ready.run, ready.texts["train"].windows
    evaluations = sum(pace.evaluates(step) for step in range(pace.steps + 1))
    batches = {
        part: math.ceil(min(run.eval_windows or math.inf, len(t.windows)) / run.batch)
        for part, t in ready.texts.items()
    }
    often = {
        part: 2 if part == "test" else evaluations for part in batches if part != "train"
    }  # test text: before and after
    tokens = round(order.total * n_tokens(windows) / len(windows))
    return Length(order.steps, tokens, evaluations, sum(n * batches[part] for part, n in often.items()))
