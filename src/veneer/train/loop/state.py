"""State of a training: trained parameters, moments, random numbers and position, enough to resume bit for
bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.attached import layers
from veneer.data.order.order import Steps
from veneer.errors import FormatError, first_few
from veneer.methods.base.protocols import Resizes
from veneer.optim.base.groups import Part
from veneer.optim.base.owned import Owned
from veneer.sites.own import is_own
from veneer.tasks import Figure
from veneer.train.folder.checkpoint import Checkpoint
from veneer.train.folder.layout import Written
from veneer.train.loop.drawing import STATE
from veneer.train.loop.step import Learner
from veneer.train.world import World


@dataclass
class Position:
    """The position after `step` steps. before, best: the task's metric by text; others: further figures."""

    step: int = 0
    tokens: int = 0
    positions: int = 0  # tokens and padding
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    evaluated: int = -1  # the last step whose evaluation is done
    before: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best: dict[str, float] = field(default_factory=dict)
    others: dict[str, dict[str, dict[str, float | None]]] = field(
        default_factory=dict
    )  # before or best, text, name

    def keep(self, when: str, figures: Mapping[str, Sequence[Figure]]) -> None:
        """Stores the figures of texts as "before" or "best": the first of each text apart."""
        setattr(self, when, {text: some[0].value for text, some in figures.items()})
        if others := {
            text: {f.name: known(f.value) for f in some[1:]} for text, some in figures.items() if some[1:]
        }:
            self.others[when] = others

    def as_meta(self, metrics: Written) -> dict[str, Any]:
        """Returns the position for a checkpoint. metrics: the lines of metrics.jsonl up to here."""
        return {"position": asdict(self), "metrics_bytes": metrics.n_bytes, "metrics_sha256": metrics.sha256}

    @classmethod
    def from_meta(cls, meta: dict[str, Any]) -> tuple[Position, Written]:
        """Returns the position, and the lines of metrics.jsonl up to it."""
        return cls(**meta["position"]), Written(meta["metrics_bytes"], meta.get("metrics_sha256"))


def fixed(learner: Learner) -> dict[str, Tensor]:
    """Returns the adapters' tensors beside their parameters, such as a subtracted start, as b.<name>."""
    trained = {id(p) for d in layers(learner.model) for p in d.parameters()}
    held = learner.model.state_dict(keep_vars=True)
    return {f"b.{n}": t for n, t in held.items() if is_own(n) and id(t) not in trained}


def tensors(learner: Learner) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint.

    p.<name>: parameters; m.<name>: their running means; b.<name>: see fixed;
    o.<name>.<key>: state of the optimiser, see dealt for the rest; rng, rng.1, ..: random numbers
    of each process; rng.cuda: of the first one's GPU. All processes must call it.
    """
    found = {**draws(learner), **fixed(learner), **(learner.mean.tensors() if learner.mean else {})}
    for part in learner.parts:
        found[f"p.{part.name}"] = part.parameter
        if isinstance(learner.optimiser, Owned) and learner.optimiser.is_dealt(part.parameter):
            continue
        for key, value in learner.optimiser.state.get(part.parameter, {}).items():
            found[f"o.{part.name}.{key}"] = value
    return found


def dealt(learner: Learner) -> dict[str, Tensor]:
    """Returns the states that one process each keeps, all in the first one. All processes must call it."""
    if not isinstance(learner.optimiser, Owned) or learner.world.size == 1:
        return {}
    names = {id(part.parameter): part.name for part in learner.parts}
    every = learner.optimiser.gathered()
    return {f"o.{names[id(p)]}.{key}": t for p, some in every for key, t in some.items()}


def strides(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Returns the strides of the tensors that a file would lay out otherwise: products depend on them."""
    return {n: list(t.stride()) for n, t in tensors.items() if not t.is_contiguous()}


def laid_out(t: Tensor, stride: Sequence[int] | None) -> Tensor:
    """Returns a copy of the tensor with these strides, or contiguous without."""
    return t.clone() if stride is None else torch.empty_strided(t.shape, stride, dtype=t.dtype).copy_(t)


def restore(learner: Learner, saved: Checkpoint) -> None:
    """Restores everything. Raises FormatError, before any change, if the checkpoint has other parameters."""
    _resize(learner, saved)
    held = fixed(learner)
    wanted = {
        **{f"p.{p.name}": tuple(p.parameter.shape) for p in learner.parts},
        **{n: tuple(t.shape) for n, t in held.items()},
    }
    there = {n: tuple(t.shape) for n, t in saved.tensors.items() if n.startswith(("p.", "b."))}
    wrong = sorted(n for n in {*wanted, *there} if wanted.get(n) != there.get(n))
    if wrong:
        raise FormatError(
            f"the checkpoint of step {saved.step} has other parameters: {first_few(wrong)}; start in another"
            " folder"
        )
    put_back(learner, saved)
    strides = saved.meta.get("strides", {})
    for name, t in held.items():
        t.copy_(saved.tensors[name])
    for part in learner.parts:
        prefix = f"o.{part.name}."
        state = {n.removeprefix(prefix): t for n, t in saved.tensors.items() if n.startswith(prefix)}
        if state and (not isinstance(learner.optimiser, Owned) or learner.optimiser.holds(part.parameter)):
            device = part.parameter.device
            learner.optimiser.state[part.parameter] = {
                k: laid_out(t, strides.get(f"{prefix}{k}")).to(device) for k, t in state.items()
            }
    draw_on(learner, saved.tensors)


def _resize(learner: Learner, saved: Checkpoint) -> None:
    shapes = {n.removeprefix("p."): t.shape for n, t in saved.tensors.items() if n.startswith("p.")}
    resize(learner.model, learner.parts, shapes)


def resize(model: nn.Module, parts: Sequence[Part], shapes: Mapping[str, torch.Size]) -> None:
    """Gives changes that resize themselves in training these shapes of their parameters, by name."""
    names = {id(part.parameter): part.name for part in parts}
    for held in layers(model):
        for delta in (held[name] for name in held.names()):
            if isinstance(delta, Resizes):
                own = {n: names.get(id(p), "") for n, p in delta.named_parameters()}
                if all(key in shapes for key in own.values()):
                    delta.resize({n: shapes[key] for n, key in own.items()})


def draws(learner: Learner) -> dict[str, Tensor]:
    """Returns the states of the random numbers: of every process, and of the first one's GPU."""
    found, device = _of_processes(learner.world), learner.parts[0].parameter.device
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(device)
    return found


def draw_on(learner: Learner, saved: Mapping[str, Tensor]) -> None:
    """Continues this process' random numbers from the states of `draws`."""
    own = "rng" if learner.world.first else f"rng.{learner.world.rank}"
    if learner.world.size == 1 and STATE in saved:  # several processes drew for the task apart
        own = STATE
    torch.set_rng_state(saved.get(own, saved["rng"]))
    if own not in saved:  # fewer processes saved it; two with the same draws would drop out alike
        torch.manual_seed(int(torch.randint(1 << 62, ())) ^ learner.world.rank)
    if "rng.cuda" in saved:
        torch.cuda.set_rng_state(saved["rng.cuda"], learner.parts[0].parameter.device)


def return_point(learner: Learner, order: Steps) -> Callable[[], None]:
    """Returns a function that makes the step that begins here undone, before it changes parameters."""
    if learner.shapes is None or learner.world.size > 1:  # nothing ends within such a step
        return lambda: None
    drawn, ordered = draws(learner), order.state()

    def back() -> None:
        draw_on(learner, drawn)
        order.restore(ordered)

    return back


def known(value: float) -> float | None:
    """Returns a figure as JSON has it: None for NaN and infinity, as of a score without any case."""
    return value if math.isfinite(value) else None


def _of_processes(world: World) -> dict[str, Tensor]:
    own = torch.get_rng_state()
    if world.size == 1:
        return {"rng": own}
    every = torch.zeros(world.size, len(own), dtype=torch.int64)
    every[world.rank] = own.long()
    states = world.sum(every).to(torch.uint8)
    return {"rng" if rank == 0 else f"rng.{rank}": t.clone() for rank, t in enumerate(states)}


@torch.no_grad()
def put_back(learner: Learner, saved: Checkpoint) -> None:
    """Restores the trained parameters and their means alone."""
    _resize(learner, saved)
    for part in learner.parts:
        part.parameter.copy_(saved.tensors[f"p.{part.name}"])
    if learner.mean is not None:
        learner.mean.restore(saved.tensors)
