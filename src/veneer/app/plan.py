"""`plan`: what a training would take, layer by layer, in memory, operations and time, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.adapt.attach import base_parameters, changes, using
from veneer.analyse import resident, simulate
from veneer.analyse.simulate import Memory, Shape
from veneer.app import fit as training
from veneer.app import machine, pretrained
from veneer.app.halve import Trial, halving
from veneer.app.measure import Measured, measure
from veneer.app.ready import FULL, NAME, Ready, prepare
from veneer.data.order import Order
from veneer.data.pack import Window, n_labels, n_tokens
from veneer.errors import VeneerError
from veneer.train.loop import Pace
from veneer.train.progress import Voice
from veneer.train.run import Run


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
    """Memory in bytes. measured: what three steps showed, or None without a probe; problem: why it will not fit, or None."""

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
        return self.length.steps * self.measured.seconds + self.length.batches * self.measured.evaluation_seconds

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        run = self.run
        return {
            **{name: getattr(run, name) for name in ("model", "method", "device", "precision", "batch", "accumulate", "length")},
            "layers": [{("in" if k == "in_" else k): v for k, v in layer._asdict().items()} for layer in self.layers],
            "trained_parameters": self.trained,
            "base_parameters": self.base,
            "share": self.share,
            "memory_bytes": {run.method: self.memory._asdict(), **({} if run.method == FULL else {FULL: self.full._asdict()})},
            "memory_is": "measured" if self.measured else "estimated from shapes",
            "growth_bytes": self.growth,
            "available_bytes": self.available,
            "flops_per_step": {**self.flops._asdict(), "total": self.flops.total, "full_total": self.full_flops.total},
            **self.length._asdict(),
            "probe": self.measured._asdict() if self.measured else None,
            "seconds": self.seconds,
            "halving": [t._asdict() for t in self.halving],
            "fits": self.problem is None,
            "problem": self.problem,
        }


def plan(run: Run, *, probe: bool = True, progress: bool = True) -> Plan:
    """What `fit` would take with these settings; nothing is written.

    probe: take three steps on the run's own texts, in memory, for seconds and bytes as they are; without it, or where the
    training would not fit, memory is estimated from shapes. progress: sentences on stderr. Raises the errors of `fit` for
    settings that make no sense, and NoRoom where the model itself does not fit.
    """
    voice, device = Voice(progress), machine.device(run.device)
    _check_weights(run, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        ready = prepare(run, device, voice)
        order, pace = training._plan(ready.run, ready.texts["train"].windows)
        shape = _shape(ready.run, ready.texts["train"].windows, order)
        own, full = _simulated(ready, shape)
        room = resident.available(device)
        problem = _problem(ready.run, own.memory.growth, room, device)
        trials = halving(ready, shape, own.memory)
        measured = measure(ready, order, pace) if probe and problem is None else None
    if measured:
        own = own._replace(memory=measured.corrected(own.memory))
    return Plan(
        run=ready.run,
        layers=layers(ready),
        trained=sum(p.parameter.numel() for p in ready.parts),
        base=sum(p.numel() for p in base_parameters(ready.model).values()),
        memory=own.memory,
        full=full.memory,
        flops=own.flops,
        full_flops=full.flops,
        length=_length(ready, order, pace),
        measured=measured,
        halving=trials,
        available=room,
        problem=problem,
    )


def _check_weights(run: Run, device: torch.device) -> None:
    """Raises NoRoom if the model's weights alone are larger than what is left; nothing is loaded to find that out."""
    n, room = pretrained_size(run.model), resident.available(device)
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
    return "bf16" if machine.multiplies_bf16(device) else "fp32"


def pretrained_size(name: str) -> int | None:
    """Parameters of a model by its configuration alone, tied ones once; None where that cannot be told."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pretrained.source(name)))
    except (OSError, ValueError, KeyError):  # said better where the model is loaded
        return None
    return sum(p.numel() for p in model.parameters())


def _shape(run: Run, windows: Sequence[Window], order: Order) -> Shape:
    """The largest batch that the training may meet."""
    rows = min(run.batch, order.total)
    tokens = max(n_tokens([w]) for w in windows)
    labels = min(rows * tokens, math.ceil(rows * n_labels(windows) / len(windows)))
    return Shape(rows, tokens, labels, min(run.accumulate, math.ceil(order.total / rows)), any(len(w) > 1 for w in windows))


def _simulated(ready: Ready, shape: Shape) -> tuple[simulate.Step, simulate.Step]:
    """This method's step, and that of full fine-tuning."""
    narrow = ready.run.precision == "bf16"
    if ready.run.method == FULL:
        own = simulate.step(ready.model, shape, full=True, autocast=narrow)
        return own, own
    own = simulate.step(ready.model, shape)
    with using(ready.model):
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
        return [Layer(p.name, p.parameter.shape[0], p.parameter[0].numel(), None, p.parameter.numel(), 1.0) for p in ready.parts]
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
    batches = {part: math.ceil(min(run.eval_windows or math.inf, len(t.windows)) / run.batch) for part, t in ready.texts.items()}
    often = {part: 2 if part == "test" else evaluations for part in batches if part != "train"}  # test text: before and after
    tokens = round(order.total * n_tokens(windows) / len(windows))
    return Length(order.steps, tokens, evaluations, sum(n * batches[part] for part, n in often.items()))


UNITS = ("bytes", "kB", "MB", "GB", "TB")


def size(n: float) -> str:
    """ "1.2 GB": bytes for people, in thousands."""
    power = 0 if n < 1000 else min(len(UNITS) - 1, int(math.log10(n) // 3))
    return f"{n / 1000**power:.{0 if power == 0 else 1}f} {UNITS[power]}"


def seconds(n: float) -> str:
    """ "3 min 20 s": seconds for people."""
    if n < 60:
        return f"{n:.2g} s" if n < 10 else f"{n:.0f} s"
    return f"{n // 60:.0f} min {n % 60:.0f} s" if n < 3600 else f"{n // 3600:.0f} h {n % 3600 // 60:.0f} min"


PARTS: Mapping[str, str] = {
    "weights": "weights of the base",
    "adapter": "adapter, and what it keeps",
    "gradients": "gradients",
    "optimiser": "optimiser state",
    "activations": "kept for the backward",
    "logits": "logits and their gradient",
    "peak": "at most at once",
}

PRODUCTS: Mapping[str, str] = {
    "forward": "forward",
    "inputs": "gradients of inputs",
    "weights": "gradients of weights",
    "attention": "attention",
    "adapter": "adapter",
}


def text(found: Plan) -> str:
    """The plan for people."""
    return "\n".join([*_of_layers(found), "", *_of_memory(found), "", *_of_time(found), "", *_of_halving(found)])


def _of_layers(p: Plan) -> list[str]:
    lines = [f"{'layer':<44} {'shape':>13} {'rank':>5} {'trained numbers':>15} {'of W':>7}"]
    for n in p.layers:
        rank = "-" if n.rank is None else n.rank
        lines.append(f"{n.site[-44:]:<44} {f'{n.out} x {n.in_}':>13} {rank:>5} {n.trained:>15,} {n.share:>7.2%}")
    return [*lines, f"{p.run.method} trains {p.trained:,} numbers, {p.share:.2%} of the base's {p.base:,}"]


def _of_memory(p: Plan) -> list[str]:
    columns = {p.run.method: p.memory} if p.run.method == FULL else {p.run.method: p.memory, "full fine-tuning": p.full}
    source = "measured" if p.measured else "estimated from shapes"
    lines = [f"{'memory':<28}" + "".join(f"{name:>18}" for name in columns)]
    lines += [f"{what:<28}" + "".join(f"{size(getattr(m, part)):>18}" for m in columns.values()) for part, what in PARTS.items()]
    lines.append(f"{p.run.method}: {source}{'' if p.run.method == FULL else '; full fine-tuning: estimated from shapes'}")
    if p.measured and p.measured.growth is not None:
        lines.append(f"the process grew by {size(p.measured.growth)} over the loaded model, what libraries and free pieces take included")
    room = "not known" if p.available is None else size(p.available)
    return [*lines, f"available on {p.run.device}: {room}", p.problem or "fits"]


def _of_time(p: Plan) -> list[str]:
    parts = ", ".join(f"{what} {n / 1e9:,.2f}" for part, what in PRODUCTS.items() if (n := getattr(p.flops, part)))
    lines = [f"10^9 operations a step: {p.flops.total / 1e9:,.2f} ({parts}); full fine-tuning {p.full_flops.total / 1e9:,.2f}"]
    lines.append(f"{p.length.steps:,} steps, {p.length.tokens:,} tokens, {p.length.evaluations:,} evaluations")
    if p.measured is None or p.seconds is None:
        return [*lines, "seconds: not measured (no probe)"]
    speed = p.length.tokens / p.length.steps / p.measured.seconds
    return [*lines, f"{p.measured.seconds:.3g} s a step ({speed:,.0f} tokens/s): {seconds(p.seconds)} in all, evaluations included"]


def _of_halving(p: Plan) -> list[str]:
    if not p.halving:
        return ["no setting is left that could be halved"]
    best = p.halving[0]
    verb = "halves the memory" if best.halves else "does most, which is not half:"
    first = f"one setting: {best.change} {verb} {size(p.memory.peak)} -> {size(best.share * p.memory.peak)} (estimated)"
    return [first, *(f"  {t.change}: {t.share:.0%}" for t in p.halving[1:])]
