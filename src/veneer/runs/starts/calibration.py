"""Collects statistics of the training's own examples for data-dependent starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer import methods
from veneer.adapt.calibrate import calibrate
from veneer.data.spread import spread
from veneer.methods import Stats, inits
from veneer.sites import Site
from veneer.tasks import Batch, Task
from veneer.tasks.base.task import batches, nothing
from veneer.train.folder import checkpoint
from veneer.train.folder.layout import CHECKPOINTS
from veneer.train.loop.progress import Voice
from veneer.train.run import Run


def needed(run: Run) -> bool:
    """Tells if the run's start needs statistics of the loss."""
    return run.init is not None and inits.needs(run.init).data


def goes_on(run: Run) -> bool:
    """Tells if there is a checkpoint to resume from, which holds the start."""
    return run.resume and any(
        checkpoint.damage(path) is None for path in checkpoint.found(Path(run.out) / CHECKPOINTS)
    )


def statistics(
    model: nn.Module, run: Run, task: Task, examples: Sequence[Any] | None, voice: Voice
) -> dict[str, Stats]:
    """Returns statistics of the examples; without examples, empty ones of the right shapes."""
    return unseen(model, run) if examples is None else look(model, run, task, examples, voice)


def unseen(model: nn.Module, run: Run) -> dict[str, Stats]:
    """Returns empty statistics of the right shapes."""
    return {site.name: methods.unseen(site) for site in sites(model, run)}


def sites(model: nn.Module, run: Run) -> list[Site]:
    return methods.get(run.method).find(model, run.to, run.exclude, run.untie, options=run.options)


def look(model: nn.Module, run: Run, task: Task, examples: Sequence[Any], voice: Voice) -> dict[str, Stats]:
    """Returns statistics of evenly spaced examples. Raises the errors of `calibrate`."""
    chosen = spread(examples, run.calibration)
    needs = inits.needs(run.init or "kaiming")
    share = 1 / max(1, sum(map(task.labels, chosen))) if needs.mean else 1.0
    given = (batch for _, batch in batches(task, model, chosen, run.batch, nothing))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return share * task.loss(model, batch)[0]

    own = methods.options_of(methods.get(run.method))["rank"].default
    rank = max(run.options.get("rank", own), *run.rank_pattern.values(), 1)
    to = "|".join(re.escape(site.name) for site in sites(model, run))
    with voice.phase("calibrating the start"):
        found = calibrate(
            model,
            given,
            rank=rank,
            to=to,
            untie=run.untie,
            loss=loss,
            seed=run.seed,
            inputs=not needs.gradient,
        )
    voice.say(
        f"init {run.options['init']!r} used statistics of {len(chosen)} {task.EXAMPLE}s of the training text"
    )
    return found
