"""Steps to a second reference, added after the first full runs: 90 % of tuned LoRA's gain on validation text.

At rank 8 no contender reached the first reference, 90 % of full fine-tuning's gain, so that speeds could not
be compared there. Nothing else was changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from veneer.ops.intervals import of_mean
from veneer.search.compare.training import TRIALS, points_of
from veneer.search.decide.reach import reached, reference
from veneer.search.decide.trial import Trial
from veneer.search.study.protocol import LORA
from veneer.tasks import Metric

STEPS = "steps_to_lora"


def steps_to_lora(folder: Path, found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns mean and interval of the steps, over the seeds that get there, of each contender that does.

    folder, found: of a finished comparison, and its results.json.
    """
    metric = Metric(**found["metric"])
    curves = {
        row["label"]: [
            points_of(folder / TRIALS / Trial(row["label"], row["lr"], found["seed"] + i).key, metric)
            for i in range(found["seeds"])
        ]
        for row in found["methods"]
        if row["lr"] is not None
    }
    own = [points for points in curves.get(LORA, ()) if len(points) > 1]
    if not own:
        return {}
    wanted = reference(mean(p[0].valid for p in own), mean(p[-1].valid for p in own))
    hits = {
        label: [hit.steps for points in every if (hit := reached(points, wanted, metric))]
        for label, every in curves.items()
    }
    return {label: of_mean(steps).as_dict() for label, steps in hits.items() if steps}
