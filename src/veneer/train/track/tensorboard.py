"""TensorBoard: event files in the run's folder. To look at them: tensorboard --logdir runs"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.train.track.base import Tracker, numbers


class TensorBoard(Tracker):
    """Scalars by name, the configuration as text, and the results as scalars under results/."""

    packages = ("tensorboard",)

    def start(self, folder: Path, config: Mapping[str, Any], *, step: int, known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what came after the checkpoint that a resumed run goes on from.
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self.writer.add_text("config", _block(config), step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            for name, value in numbers(results).items():
                self.writer.add_scalar(f"results/{name}", value, results["steps"])
        self.writer.close()


def _block(content: Mapping[str, Any]) -> str:
    return "\n".join(
        f"    {line}" for line in json.dumps(content, indent=2, default=list).splitlines()
    )  # as code in Markdown
