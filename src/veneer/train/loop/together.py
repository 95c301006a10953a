"""Several trainings in step on one base: one pass for the batches of all; each adapter learns from its own
rows.

Every training has a model of its own and evaluates, saves and stops as if alone; the models share the base's
weights. Only steps are made together, on one more model, the carrier, whose bank holds all the changes. An
adapter's gradient depends on its own rows only: each learns what it would alone, up to rounding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from veneer.adapt import attach, attached, hooks, switch
from veneer.adapt.banks.bank import Bank
from veneer.adapt.banks.entries import check_trainable
from veneer.adapt.banks.make import living
from veneer.errors import ConfigError, VeneerError, first_few
from veneer.sites import site_of_kind
from veneer.sites.finding.kinds import layers_of
from veneer.sites.own import is_own
from veneer.sites.roles import output_head
from veneer.tasks.base.abilities import Joint
from veneer.train.errors import Diverged
from veneer.train.loop.loop import Loop
from veneer.train.loop.signals import Stop, Wish
from veneer.train.loop.state import Position
from veneer.train.loop.step import Learner, Outcome


class Due(NamedTuple):
    """One training's next step: its number in the bank, its learner, its micro-batches and its rate."""

    number: int
    learner: Learner
    micro: list[list[Any]]
    rate: float


def share_base(models: Sequence[nn.Module]) -> None:
    """Makes models of equal weights share those of the first; frees their own."""
    first = models[0]
    for model in models[1:]:
        for name, p in attached.base_parameters(model).items():
            p.data = first.get_parameter(name).data
        for name in [n for n, _ in model.named_buffers() if not is_own(n)]:
            path, _, own = name.rpartition(".")
            model.get_submodule(path)._buffers[own] = first.get_buffer(name)


def check(models: Mapping[str, nn.Module], adapter: str) -> None:
    """Raises ConfigError for all models, by name, whose `adapter` cannot be trained beside others."""
    check_trainable({name: attached.changes(model, adapter) for name, model in models.items()})
    for name, model in models.items():
        heads = sorted({site.name for site, _ in attached.changes(model, adapter)} & output_head(model))
        if heads:
            raise ConfigError(
                f"{name!r} changes the output head {first_few(heads)}, which the rows of all runs share;"
                " leave it"
                " out with exclude="
            )


def carry(models: Sequence[nn.Module], adapter: str) -> Bank:
    """Returns the bank of a copy of the first model on the same weights; adapter i + 1 is models[i]'s."""
    found = {str(i): attached.changes(model, adapter) for i, model in enumerate(models)}
    first = models[0]
    carrier = copy.deepcopy(
        first, {id(t): t for t in [*attached.base_parameters(first).values(), *first.buffers()]}
    )
    kinds = {site.name: site.kind for changes in found.values() for site, _ in changes}
    modules = {**layers_of(carrier), **dict(carrier.named_modules())}
    sites = {name: site_of_kind(kind, name, modules[name]) for name, kind in kinds.items()}
    hooks.hang(carrier, "bank", living(found, sites))
    attach.detach(carrier, adapter)
    switch.activate(carrier, "bank")
    return Bank(carrier)


def run_together(loops: Sequence[Loop], bank: Bank, wish: Wish) -> list[Position]:
    """Trains all loops to their ends; loop i is adapter i + 1 of the bank.

    Raises Interrupted after a signal, and Diverged if one training skips too many steps; all are saved first.
    """
    started: list[float] = []  # before the first step: evaluations before it may be another's
    for loop in loops:
        loop.wish = wish
    try:
        with loops[0].voice.bar(loops[0].pace.steps, loops[0].position.step):
            while going := [i for i, loop in enumerate(loops) if loop.goes_on()]:
                wish.check()
                started = started or [time.monotonic() - loop.position.seconds for loop in loops]
                before = time.monotonic()
                outcomes = step(bank, [Due(i + 1, loops[i].learner, *loops[i].due()) for i in going])
                for i, outcome in zip(going, outcomes, strict=True):
                    loops[i].take(outcome, before, started[i])
    except (Stop, Diverged) as e:
        stopped = [_ended(loop) for loop in loops]
        diverged = [e for e in (e, *stopped) if isinstance(e, Diverged)]
        raise (diverged or stopped)[0] from None
    finally:
        for loop in loops:
            loop.metrics.close()
    return [loop.position for loop in loops]


def _ended(loop: Loop) -> VeneerError:
    """Saves a training; returns the error that ends it."""
    try:
        return loop.interrupted()
    except Diverged as e:
        return e


def step(bank: Bank, work: Sequence[Due]) -> list[Outcome]:
    """Makes a step of each training, as Learner.step does: one pass for the k-th micro-batches of all."""
    labels = [due.learner.begin(due.micro) for due in work]
    totals = [0.0] * len(work)
    first = work[0].learner
    assert isinstance(first.task, Joint)  # checked before the training
    device = first.parts[0].parameter.device
    bank.model.train()
    for k in range(max(len(due.micro) for due in work)):
        turn = [i for i, due in enumerate(work) if k < len(due.micro)]
        rows = [len(work[i].micro[k]) for i in turn]
        bank.use([work[i].number for i, n in zip(turn, rows, strict=True) for _ in range(n)])
        batch = first.batch([w for i in turn for w in work[i].micro[k]], device)
        sums = first.task.losses(bank.model, batch, rows, [work[i].learner.smoothing for i in turn])
        means = [total / labels[i] for i, total in zip(turn, sums, strict=True)]
        sum(means[1:], means[0]).backward()
        for i, mean in zip(turn, means, strict=True):
            totals[i] += float(mean.detach())
    return [due.learner.finish(due.micro, total, due.rate) for due, total in zip(work, totals, strict=True)]
