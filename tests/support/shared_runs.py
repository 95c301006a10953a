"""Whole runs, in one process or in a share of several, and the examples that each process learned from."""

from __future__ import annotations

import hashlib
from typing import Any
from unittest import mock

import torch

from veneer.optim.base.groups import Part
from veneer.runs.fit import fit, fit_until
from veneer.train import same_start
from veneer.train.errors import Interrupted, Unlike
from veneer.train.loop.loop import Loop
from veneer.train.loop.step import Learner
from veneer.train.run import Run
from veneer.train.world import World


def until(world: World, given: dict[str, Any], step: int) -> list[tuple[int, list[str]]]:
    """Trains to a step; returns, for each step, the hashes of this process' examples."""
    seen: list[tuple[int, list[str]]] = []
    due = Loop.due

    def watched(loop: Loop) -> Any:
        micro, rate = due(loop)
        seen.append((loop.position.step, [_hash(loop, e) for some in micro for e in some]))
        return micro, rate

    with mock.patch.object(Loop, "due", watched):
        fit_until(Run.from_dict(given), step, world=world)
    return seen


def _hash(loop: Loop, example: Any) -> str:
    tensors = loop.learner.task.as_tensors([example])
    return hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in sorted(tensors.items()))).hexdigest()


def start(world: World, *, changed: str = "") -> tuple[torch.Tensor, str]:
    """Begins with other factors in each process; returns A after `same_start`, and the error's text.

    changed: what is different in the last process: "weight" or "data".
    """
    from support import models

    import veneer
    from veneer.errors import ConfigError

    model, odd = models.llama(), world.rank == world.size - 1
    veneer.attach(model, rank=2, seed=world.rank)
    if changed == "weight" and odd:
        with torch.no_grad():
            model.get_parameter("lm_head.weight")[3, 5] += 1e-3
    parts = [Part(n, p, "A") for n, p in model.named_parameters() if p.requires_grad]
    config = {"run": {}, "base": {}, "data": {"train": {"rows": 1 + (changed == "data" and odd)}}}
    try:
        same_start.same_start(model, parts, config, world, own_base=False)
    except ConfigError as e:
        return parts[0].parameter.detach().clone(), str(e)
    return parts[0].parameter.detach().clone(), ""


def whole(world: World, given: dict[str, Any]) -> tuple[int, int]:
    """Trains to the end; returns the parameters of the base that this process held, and those of the base."""
    from torch.distributed.tensor import DTensor

    from veneer.runs import divided

    held: list[tuple[int, int]] = []
    divide = divided.divide

    def watched(ready: Any, *more: Any) -> None:
        total = sum(p.numel() for p in ready.model.parameters())
        divide(ready, *more)
        own = [p.to_local() if isinstance(p, DTensor) else p for p in ready.model.parameters()]
        held.append((sum(p.numel() for p in own), total))

    with mock.patch.object(divided, "divide", watched):
        fit(Run.from_dict(given), progress=False, world=world)
    return held[0] if held else (0, 0)


def with_nan(
    world: World, given: dict[str, Any], rank: int, steps: list[int], what: str
) -> list[dict[str, Any]]:
    """Trains with a NaN in process `rank` at these steps: in its loss, or in a gradient before the exchange.

    Returns, for each step, the parameters' hash before and after it, and the reason why it was skipped.
    """
    found: list[dict[str, Any]] = []
    finish = Learner.finish

    def watched(learner: Learner, micro: Any, loss: float, rate: float) -> Any:
        before, nan = _digest(learner), world.rank == rank and len(found) + 1 in steps
        if nan and what == "gradient":
            learner.parts[0].parameter.grad[0] = float("nan")
        outcome = finish(learner, micro, float("nan") if nan and what == "loss" else loss, rate)
        found.append({"before": before, "after": _digest(learner), "skipped": outcome.skipped})
        return outcome

    with mock.patch.object(Learner, "finish", watched):
        fit(Run.from_dict(given), progress=False, world=world)
    return found


def diverged(world: World, given: dict[str, Any], rank: int, step: int, where: str) -> str:
    """Trains with the last bit of a number flipped in process `rank` after that step; returns the error.

    where: "parameter", or the name of a moment.
    """
    made: list[int] = []
    finish = Learner.finish

    def watched(learner: Learner, *more: Any) -> Any:
        outcome, part = finish(learner, *more), learner.parts[1]
        made.append(1)
        if world.rank == rank and len(made) == step:
            t = part.parameter if where == "parameter" else learner.optimiser.state[part.parameter][where]
            t.data.view(torch.int32)[0, 0] ^= 1
        return outcome

    with mock.patch.object(Learner, "finish", watched):
        return _refusal(world, given, Unlike)


def signalled(world: World, given: dict[str, Any], rank: int, step: int) -> str:
    """Trains; a signal comes to process `rank` while all agree before that step. Returns the error."""
    agree = Loop.agree

    def watched(loop: Loop, wish: Any) -> None:
        real = loop.world.sum

        def late(value: Any) -> Any:
            total = real(value)
            if world.rank == rank and loop.position.step == step - 1:
                wish.number = 15
            return total

        with mock.patch.object(loop.world, "sum", late):
            agree(loop, wish)

    with mock.patch.object(Loop, "agree", watched):
        return _refusal(world, given, Interrupted)


def _refusal(world: World, given: dict[str, Any], kind: type[Exception]) -> str:
    """Trains, and returns the text of an error of this kind, or "" without one."""
    try:
        fit(Run.from_dict(given), progress=False, world=world)
    except kind as e:
        return str(e)
    return ""


def _digest(learner: Learner) -> str:
    state = [p.parameter.detach() for p in learner.parts]
    state += [t for p in learner.parts for t in learner.optimiser.state.get(p.parameter, {}).values()]
    return hashlib.sha256(b"".join(torch.as_tensor(t).numpy().tobytes() for t in state)).hexdigest()
