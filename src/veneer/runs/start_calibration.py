"""The look at the training's own text that some starts take before the first step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from veneer import methods, tasks
from veneer.adapt.calibrate import calibrate
from veneer.data.pack import Window, collate
from veneer.methods import Stats, inits
from veneer.sites import Site
from veneer.tasks import Batch
from veneer.train.folder import checkpoint
from veneer.train.folder.layout import CHECKPOINTS
from veneer.train.loop.evaluate import sample
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

OBJECTIVE = "causal_lm"


def needed(run: Run) -> bool:
    """Says that the run's start needs statistics of the loss."""
    return run.init is not None and inits.get(run.init).NEEDS == "gradient"


def goes_on(run: Run) -> bool:
    """Whether there is a checkpoint to go on from, which holds the start."""
    return run.resume and any(
        checkpoint.damage(path) is None for path in checkpoint.found(Path(run.out) / CHECKPOINTS)
    )


def unseen(model: nn.Module, run: Run) -> dict[str, Stats]:
    """Statistics that say nothing, where only their shapes matter."""
    return {site.name: methods.unseen(site) for site in _sites(model, run)}


def _sites(model: nn.Module, run: Run) -> list[Site]:
    return methods.get(run.method).find(model, run.to, run.exclude, run.untie, options=run.options)


def look(model: nn.Module, run: Run, windows: Sequence[Window], pad: int, voice: Voice) -> dict[str, Stats]:
    """Statistics from windows of the training's text, evenly spaced. Raises the errors of `calibrate`."""
    chosen = sample(windows, run.calibration)
    device = next(model.parameters()).device
    batches = (
        {k: v.to(device) for k, v in collate(chosen[at : at + run.batch], pad).items()}
        for at in range(0, len(chosen), run.batch)
    )
    objective = tasks.get(OBJECTIVE)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return objective(model, batch)[0]

    rank = max(
        run.options.get("rank", methods.options_of(methods.get(run.method))["rank"].default),
        *run.rank_pattern.values(),
        1,
    )
    to = "|".join(re.escape(site.name) for site in _sites(model, run))
    with voice.phase("calibrating the start"):
        found = calibrate(model, batches, rank=rank, to=to, untie=run.untie, loss=loss, seed=run.seed)
    voice.say(f"init {run.options['init']!r} looked at {len(chosen)} windows of the training's text")
    return found
