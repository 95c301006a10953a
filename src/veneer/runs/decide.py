"""Decides the settings of a run that depend on task, method, model and machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from veneer import embedded, optim, tasks
from veneer.errors import ConfigError
from veneer.train import rates
from veneer.train.run import Run
from veneer.train.speed import graphs


def decided(run: Run, device: torch.device) -> Run:
    """Returns the run with every setting decided.

    Raises ConfigError for settings that do not fit the device.
    """
    rated = optim.make(run.optimiser, **run.optimiser_options).rated_as
    usual = (run.method, rated, run.model == embedded.PREFIX, str(run.options.get("init")))
    lr = run.lr or tasks.get(run.task).RATE * rates.default(*usual)
    fastest = max(lr, run.embedding_lr or 0.0)
    if fastest * run.weight_decay >= 1:
        raise ConfigError(
            f"weight_decay must be less than {1 / fastest:g} at rate {fastest:g}, got {run.weight_decay:g}:"
            " a step"
            " would remove whole weights"
        )
    if run.compile == "graphs" and (against := graphs.reason_against(device)):
        raise ConfigError(against)
    defaults = {name: p.default for name, p in optim.options_of(run.optimiser).items()}
    return replace(
        run,
        lr=lr,
        eval_windows=tasks.get(run.task).EVALUATED if run.eval_windows is None else run.eval_windows,
        optimiser_options={**defaults, **run.optimiser_options},
        epochs=None if run.steps else run.epochs or 1.0,
        packing=run.packing and "packing" in tasks.get(run.task).SETTINGS,
        precision=run.precision_on(device),
        device=str(device),
    )
