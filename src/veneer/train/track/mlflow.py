"""MLflow: an SQLite store in the run's folder.

To look at it: mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.train.track.base import Tracker, flat, numbers, title

EXPERIMENT = "veneer"
LONGEST = 6000  # letters that MLflow takes as the value of a parameter
PARAMETERS, METRICS = 100, 1000  # that it takes in one call
PATIENCE = 5.0  # seconds between writings; each is a transaction


class MLflow(Tracker):
    """One run of the experiment "veneer": the settings as parameters, figures as metrics."""

    packages = ("mlflow", "sqlalchemy", "alembic")

    def start(self, folder: Path, config: Mapping[str, Any], *, step: int, known: str | None) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        from mlflow.tracking import MlflowClient

        place = folder.resolve()
        self.waiting: list[Any] = []
        self.written = time.monotonic()
        self.client: Any = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return known
        found = self.client.get_experiment_by_name(EXPERIMENT)
        artifacts = (place / "mlflow").as_uri()
        experiment = (
            found.experiment_id
            if found
            else self.client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        )
        self.id = str(self.client.create_run(experiment, run_name=title(folder)).info.run_id)
        self._keep_settings(config)
        return self.id

    def _keep_settings(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        every = [Param(name, str(value)[:LONGEST]) for name, value in flat(config["run"])]
        for i in range(0, len(every), PARAMETERS):
            self.client.log_batch(self.id, params=every[i : i + PARAMETERS])
        self.client.set_tag(self.id, "base", config["base"]["sha256"])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.waiting += [Metric(name, value, now, step) for name, value in figures.items()]
        if time.monotonic() - self.written > PATIENCE or len(self.waiting) > METRICS // 2:
            self._write()

    def _write(self) -> None:
        for i in range(0, len(self.waiting), METRICS):
            self.client.log_batch(self.id, metrics=self.waiting[i : i + METRICS])
        self.waiting, self.written = [], time.monotonic()

    def finish(self, results: Mapping[str, Any] | None) -> None:
        if results is not None:
            self.log(results["steps"], {f"results.{name}": value for name, value in numbers(results).items()})
        self._write()
        self.client.set_terminated(self.id, status="KILLED" if results is None else "FINISHED")
