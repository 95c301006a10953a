"""Every method, start and optimiser in bfloat16 on the device, against float32 on the CPU.

The same in bfloat16 on the CPU says how much rounding explains: the device may be off by three times as much.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import veneer
from gpu import models
from veneer import methods as table
from veneer import optim
from veneer.adapt.attached import changes
from veneer.errors import VeneerError
from veneer.methods import inits
from veneer.optim.base import groups

ALLOWED, FLOOR = 3.0, 5e-3  # of the CPU's own rounding, and relative
REFUSED = {"full"}  # a change of a module each: optimisers train all weights in GaLore's part


def methods(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Outputs and gradients of every method."""
    return _counted("methods", [n for n in table.available() if n not in REFUSED], _method, device)


def starts(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """The change at the start, and the kept part, of every start."""
    return _counted("starts", inits.available(), _start, device)


def optimisers(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """The trained parameters after three steps of every optimiser."""
    return _counted("optimisers", optim.available(), _optimiser, device)


def _counted(
    what: str, names: Iterable[str], check: Callable[[str, str], str | None], device: str
) -> dict[str, Any]:
    names, problems = list(names), []
    warnings.simplefilter("ignore")
    for name in names:
        try:
            problem = check(name, device)
        except (VeneerError, RuntimeError, TypeError, ValueError) as e:
            problem = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        if problem:
            problems.append(f"{name}: {problem}")
    right = len(names) - len(problems)
    return {what: float(len(names)), f"{what}_right": float(right), "problems": problems}


def _three(device: str) -> list[Any]:
    """Returns the model in float32 and bfloat16 on the CPU, and in bfloat16 on the device."""
    kinds = ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.bfloat16, device))
    return [models.llama(dtype, where) for dtype, where in kinds]


def judged(found: Sequence[Tensor], what: str) -> str | None:
    """Returns the problem if the device is further from the exact numbers than rounding explains.

    found: exact ones, those of the CPU in bfloat16, and those of the device.
    """
    exact, ours, theirs = found
    off, allowed = models.off(theirs, exact), ALLOWED * models.off(ours, exact) + FLOOR
    return None if off <= allowed else f"{what} are {off:.2g} off, rounding explains {allowed:.2g}"


def _method(name: str, device: str) -> str | None:
    every = _three(device)
    options: dict[str, Any] = {"rank": 4} if name in ("bat", "miss") else {}
    options |= {"to": "all-linear"} if name == "bitfit" else {}  # a Llama has no bias of its own
    for model in every:
        veneer.attach(model, name, **options)
    models.randomise(every[0])
    found = []
    for model in every:
        if model is not every[0]:
            models.copy_adapter(every[0], model)
        where = str(next(model.parameters()).device)
        found.append(models.outputs(model, models.batch(where)))
    logits, gradients = zip(*found, strict=True)
    return judged(logits, "outputs") or judged(gradients, "gradients")


def _start(name: str, device: str) -> str | None:
    return judged([_started(model, name) for model in _three(device)], "starting changes")


def _started(model: Any, name: str) -> Tensor:
    """Returns the products s B A of all layers at the start, and those that are subtracted."""
    needs, where = inits.needs(name), str(next(model.parameters()).device)
    method = "lorafa" if name == "keeplora" else "lora"  # KeepLoRA's A is frozen
    stats = None
    if needs.residual:
        stats = veneer.quantise_around(model, "nf4", start=name, rank=4, to=["q_proj"])
    elif needs.gradient or needs.inputs or needs.oriented:
        loss = models.task().loss
        stats = veneer.calibrate(
            model,
            [models.batch(where)],
            rank=4,
            to=["q_proj"],
            loss=lambda m, b: loss(m, b)[0],
            inputs=not needs.gradient,
        )
    veneer.attach(model, method, init=name, rank=4, to=["q_proj"], stats=stats)
    deltas: list[Any] = [delta for _, delta in changes(model, "default")]
    whole = torch.cat([(d.scaling * d.B @ d.A).detach().float().flatten().cpu() for d in deltas])
    return whole if whole.norm() else torch.cat([d.A.detach().float().flatten().cpu() for d in deltas])


def _optimiser(name: str, device: str) -> str | None:
    return judged([_stepped(model, name) for model in _three(device)], "parameters")


def _stepped(model: Any, name: str) -> Tensor:
    """Returns the change of the trained parameters by three steps."""
    where = str(next(model.parameters()).device)
    if name == "galore":  # steps weights
        model.float().requires_grad_(True)
        parts = groups.of_base(model)
    else:
        veneer.attach(model, "lora", rank=4, to=["q_proj", "down_proj"])
        models.randomise(model)
        parts = groups.of_adapter(model, "default")
    before = [copy.deepcopy(p.parameter.detach()).float() for p in parts]
    made: Any = optim.make(name).build(optim.Trained(parts))
    groups.set_rates(made, 1e-3, 0.0)
    for seed in range(3):
        total, n = models.task().loss(model, models.batch(where, seed=seed))
        made.zero_grad()
        (total / n).backward()
        made.step()
    moved = [p.parameter.detach().float() - b for p, b in zip(parts, before, strict=True)]
    return torch.cat([m.flatten().cpu() for m in moved])
