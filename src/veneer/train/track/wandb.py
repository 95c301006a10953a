"""Weights & Biases, offline: files in the run's folder, sent by nobody but `wandb sync`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.train.track.base import Tracker, numbers, title

PROJECT = "veneer"


class WeightsAndBiases(Tracker):
    """One run of the project "veneer". A resumed run writes a second folder with the same id, which `wandb
    sync --append` joins."""

    packages = ("wandb",)

    def start(self, folder: Path, config: Mapping[str, Any], *, step: int, known: str | None) -> str:
        os.environ.setdefault(
            "WANDB_ERROR_REPORTING", "false"
        )  # read on import; its crash reports need a network
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            init_timeout=60,
        )
        self.run: Any = wandb.init(
            project=PROJECT,
            id=known or uuid.uuid4().hex[:8],
            name=title(folder),
            dir=str(folder),
            config=dict(config),
            mode="offline",
            reinit="create_new",  # never the run that the caller's own code may have open
            settings=quiet,
        )
        return str(self.run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self.run.summary.update(numbers(results))
        self.run.finish(exit_code=0 if results is not None else 1)
