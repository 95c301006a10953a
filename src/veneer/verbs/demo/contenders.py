"""Lists the trainings of the demo: methods, their measured rates, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from veneer import embedded
from veneer.train.run import Run

WINDOWS, LENGTH, BATCH = 24, 256, 4


class Contender(NamedTuple):
    """One way to train. rates: the peak learning rate by target, chosen on validation text by
    bench/demo_rates.py."""

    method: str
    rates: Mapping[str, float]
    settings: Mapping[str, Any]


CONTENDERS = {
    "full": Contender("full", {"prose": 6e-4, "c": 6e-4}, {}),
    "lora": Contender("lora", {"prose": 5e-3, "c": 5e-3}, {"options": {"rank": 8}}),
    "loraplus": Contender(
        "lora", {"prose": 5e-4, "c": 1e-3}, {"options": {"rank": 8}, "optimiser": "loraplus"}
    ),
}


def settings(
    folder: Path,
    target: str,
    label: str,
    contender: Contender,
    *,
    steps: int,
    seed: int,
    lr: float | None = None,
) -> Run:
    """Returns the run of one contender on one target."""
    return Run(
        data=(f"{embedded.PREFIX}:{target}",),
        method=contender.method,
        lr=lr or contender.rates[target],
        steps=steps,
        batch=BATCH,
        length=LENGTH,
        eval_every=max(1, steps // 2),
        save_every=max(1, steps // 2),
        eval_windows=WINDOWS // 4,  # of 512 tokens
        seed=seed,
        out=str(folder / f"{target}-{label}"),
        resume=True,
        report=False,  # the demo has a page of its own
        **contender.settings,
    )
