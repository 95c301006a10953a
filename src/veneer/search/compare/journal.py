"""The journal of a comparison: an Optuna study in a file that several processes append to.

Every trial is a trial of the study: its evaluations are intermediate values, a dropped one is pruned, a
diverged one failed. Optuna's own tools show it: `optuna-dashboard journal.log`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from veneer.errors import NotWritten
from veneer.search.decide.trial import DIVERGED, FINISHED, Point, Progress, Trial
from veneer.tasks import Metric
from veneer.train.errors import NotSaved

FILE, STUDY = "journal.log", "compare"
LOWEST, HIGHEST, SEEDS = 1e-9, 1e4, 1 << 31  # bounds of the study's distributions, never drawn from


class Journal:
    """The trials of the comparison in a folder."""

    def __init__(self, folder: Path, metric: Metric) -> None:
        """Opens the journal, or begins it. Raises NotSaved on a full disk."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self.metric, self.file = metric, folder / FILE
        with self._saving():
            self.study = optuna.create_study(
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(self.file))),
                sampler=optuna.samplers.RandomSampler(seed=0),
                study_name=STUDY,
                direction="minimize" if metric.lower_is_better else "maximize",
                load_if_exists=True,
            )

    def read(self) -> dict[str, Progress]:
        """Returns the progress of all trials by key, as of now."""
        return {key: _progress(t) for key, t in self._trials().items()}

    def ends(self) -> dict[str, str]:
        """Returns why trials were dropped, by key."""
        return {key: t.user_attrs["end"] for key, t in self._trials().items() if "end" in t.user_attrs}

    def put(self, trial: Trial, progress: Progress) -> None:
        """Records the progress of a trial. Raises NotSaved on a full disk."""
        import optuna

        with self._saving():
            number = self._number(trial)
            live = optuna.trial.Trial(self.study, self.study.trials[number]._trial_id)
            reported = self.study.trials[number].intermediate_values
            for point in progress.points:
                if point.step not in reported:
                    live.report(point.valid, point.step)
            live.set_user_attr("progress", json.dumps(progress))
            if progress.state == FINISHED:
                self.study.tell(number, self._best(progress))
            elif progress.state == DIVERGED:
                self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def drop(self, trial: Trial, share: float, reason: str) -> None:
        """Records that a trial ends early. Raises NotSaved on a full disk."""
        import optuna

        found = self._trials()[trial.key]
        if found.state.is_finished():
            return
        with (
            self._saving(),
            suppress(optuna.exceptions.UpdateFinishedTrialError),
        ):  # another process was first
            live = optuna.trial.Trial(self.study, found._trial_id)
            live.set_user_attr("end", reason)
            self.study.tell(found.number, state=optuna.trial.TrialState.PRUNED, skip_if_finished=True)

    def note(self, name: str, value: Any) -> None:
        """Keeps a fact of the whole comparison. Raises NotSaved on a full disk."""
        with self._saving():
            self.study.set_user_attr(name, value)

    def noted(self, name: str) -> Any:
        """Returns the fact of this name, or None."""
        return self.study.user_attrs.get(name)

    def _trials(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for t in self.study.get_trials(deepcopy=False):
            found.setdefault(t.user_attrs["key"], t)
        return found

    def _number(self, trial: Trial) -> int:
        """Returns the study's number of a trial, which the holder of its claim may begin."""
        import optuna

        found = self._trials()
        if trial.key not in found:
            wide = optuna.distributions.FloatDistribution
            kinds = {
                "method": optuna.distributions.CategoricalDistribution((trial.label,)),
                "lr": wide(LOWEST, HIGHEST, log=True),
                "seed": optuna.distributions.IntDistribution(0, SEEDS),
            }
            values = {"method": trial.label, "lr": trial.lr, "seed": trial.seed}
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=values,
                    distributions=kinds,
                    user_attrs={"key": trial.key, "length": trial.length},
                )
            )
            found = self._trials()
        return int(found[trial.key].number)

    def _best(self, progress: Progress) -> float:
        return min((p.valid for p in progress.points if p.step), key=self.metric.cost)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, NotWritten) as e:
            raise NotSaved(
                f"{self.file} could not be written: {e}; make room and give the same command again"
            ) from e


def _progress(t: Any) -> Progress:
    """Returns the progress that a trial of the study records."""
    share, state, points, reason = json.loads(t.user_attrs.get("progress", '[0.0, "going", [], ""]'))
    return Progress(share, state, tuple(Point(*p) for p in points), reason)
