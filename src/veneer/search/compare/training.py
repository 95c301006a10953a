"""Trains the trials of a comparison, alone or several in one pass, beside other processes on one journal."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from veneer.errors import ConfigError
from veneer.runs.fit import fit_until
from veneer.runs.fit_many import fit_many_until
from veneer.runs.shared import Shared
from veneer.search.compare.journal import Journal
from veneer.search.decide.halving import diverged
from veneer.search.decide.trial import DIVERGED, FINISHED, GOING, Point, Progress, Trial, every, rung
from veneer.tasks import Metric, get
from veneer.tasks.base.abilities import Joint
from veneer.train.errors import Busy, Diverged
from veneer.train.folder import layout, lock
from veneer.train.loop.progress import Voice
from veneer.train.run import Run

TRIALS, CLAIMS = "trials", "claims"
WAIT = 0.5  # seconds between two looks at the journal while other processes train
BANK = "seconds_in_a_bank"  # noted in the journal: of one trial in a bank, over those alone


class Training:
    """Trains trials in folders of their own; a `Trainer`."""

    def __init__(
        self, runs: Mapping[str, Run], steps: int, folder: Path, voice: Voice, together: int
    ) -> None:
        """Opens the comparison in `folder`. runs: of every contender; together: most trials in one pass."""
        self.runs, self.steps, self.folder, self.voice = runs, steps, folder, voice
        self.metric: Metric = get(next(iter(runs.values())).task).METRIC
        self.journal = Journal(folder, self.metric)
        self.together, self.shared = together, Shared()
        self.alone: set[str] = {label for label, run in runs.items() if not _may_share(run)}

    def run_of(self, trial: Trial) -> Run:
        """Returns the settings of a trial."""
        steps = max(1, round(trial.length * self.steps))
        return replace(
            self.runs[trial.label],
            lr=trial.lr,
            seed=trial.seed,
            steps=steps,
            epochs=None,
            eval_every=every(steps),
            save_every=steps,
            keep=2,
            out=str(self.folder / TRIALS / trial.key),
            resume=True,
            report=False,
            track=(),
        )

    def advance(self, trials: Sequence[Trial], share: float) -> Mapping[Trial, Progress]:
        """Returns the progress of all trials once each has come to `share` of its steps, or diverged."""
        waited = False
        while due := self._due(trials, share):
            with ExitStack() as stack:
                claimed = list(self._claim(due, stack))
                claimed = self._due(claimed, share)  # another process may just have trained some
                if claimed:
                    self._train(claimed, share)
                    continue
            if not waited:
                self.voice.say(f"{len(due)} trials are being trained by another process; waiting for them")
            waited = True
            time.sleep(WAIT)
        found = self.journal.read()
        return {t: found[t.key] for t in trials}

    def drop(self, trial: Trial, share: float, reason: str) -> None:
        """Records that a trial ends early, and frees its checkpoints."""
        self.journal.drop(trial, share, reason)
        self._forget(trial)

    def _forget(self, trial: Trial) -> None:
        shutil.rmtree(self.folder / TRIALS / trial.key / layout.CHECKPOINTS, ignore_errors=True)

    def _due(self, trials: Sequence[Trial], share: float) -> list[Trial]:
        found = self.journal.read()
        done = {k for k, p in found.items() if p.state != GOING or p.share >= share}
        return [t for t in trials if t.key not in done]

    def _claim(self, due: Sequence[Trial], stack: ExitStack) -> Iterator[Trial]:
        """Yields trials that no other process trains, as many as go into one pass; held by the stack."""
        taken = 0
        for trial in due:
            if taken and (taken >= self.together or not self._shares(trial)):
                continue
            folder = self.folder / CLAIMS / trial.key
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock.held(folder))
            except Busy:
                continue
            yield trial
            taken += 1
            if not self._shares(trial):
                return

    def _shares(self, trial: Trial) -> bool:
        """Tells if a trial may train beside others."""
        slower = (self.journal.noted(BANK) or 0.0) >= 1
        return self.together > 1 and not slower and trial.label not in self.alone

    def _train(self, trials: Sequence[Trial], share: float) -> None:
        """Trains the trials to a share of their steps and records them."""
        if len(trials) > 2 and self.journal.noted(BANK) is None:
            whole = self._tried(trials[:1], share), self._tried(trials[1:], share)
            if all(whole):
                self._weigh(trials[0], trials[1:])
        else:
            self._tried(trials, share)

    def _weigh(self, alone: Trial, others: Sequence[Trial]) -> None:
        """Notes if one pass is faster, by the median seconds of a step; loading and evaluation are alike."""
        first = self._seconds(alone)
        rest = self._seconds(others[0]) / len(others)
        if first <= 0:
            return
        self.journal.note(BANK, rest / first)
        self.voice.say(
            f"{len(others)} trials in one pass take {rest:.2g} s a step each, one alone {first:.2g} s: one"
            f" pass is {'faster' if rest < first else 'slower'}"
        )

    def _seconds(self, trial: Trial) -> float:
        """Returns the median seconds of a step, of the pass for one of several trials."""
        lines = _lines(self.folder / TRIALS / trial.key / layout.METRICS)
        steps = [line for line in lines if line.get("tokens_per_second")]
        before = [0, *(line["tokens"] for line in steps)]
        spent = [(s["tokens"] - n) / s["tokens_per_second"] for s, n in zip(steps, before, strict=False)]
        return median(spent) if spent else 0.0

    def _tried(self, trials: Sequence[Trial], share: float) -> bool:
        """Trains trials and says how long it took; tells if all were trained as meant."""
        begun, n = time.monotonic(), len(trials)
        names = ", ".join(t.key for t in trials)
        with self.voice.phase(f"training {names} to {share:.3g} of the steps"):
            whole = self._in_one_pass(trials, share) if n > 1 else self._by_itself(trials[0], share)
        seconds = time.monotonic() - begun
        if whole:
            self.voice.say(f"{names}: {share:.3g} of the steps in {seconds:.1f} s")
        return whole

    def _by_itself(self, trial: Trial, share: float) -> bool:
        run, reason = self.run_of(trial), ""
        try:
            fit_until(run, rung(share, run.steps or 1), shared=self.shared)
        except Diverged as e:
            reason = e.text.splitlines()[0]
        self._record(trial, share, 1, reason)
        return not reason

    def _in_one_pass(self, trials: Sequence[Trial], share: float) -> bool:
        runs = {t: replace(self.run_of(t), compile="off") for t in trials}
        until = None if share >= 1 else rung(share, self.steps)  # trials of other lengths have no rungs
        try:
            fit_many_until(list(runs.values()), until, shared=self.shared)
        except Diverged as e:
            lost = next(t for t in trials if Path(runs[t].out) == e.folder)
            self._record(lost, share, len(trials), e.text.splitlines()[0])
            return False  # the others go on from their checkpoints
        except ConfigError as e:
            named = {t.label for t in trials if t.key in e.text} or {t.label for t in trials}
            self.voice.say(f"{', '.join(sorted(named))} train alone: {e.text.splitlines()[0]}")
            self.alone |= named
            return False
        for trial in trials:
            self._record(trial, share, len(trials), "")
        return True

    def _record(self, trial: Trial, share: float, n: int, reason: str) -> None:
        """Puts the evaluations so far into the journal. n: trials that shared the time."""
        folder = self.folder / TRIALS / trial.key
        lines = _lines(folder / layout.METRICS)
        before = self.journal.read().get(trial.key, Progress(0.0, GOING))
        points = joined(before.points, lines, self.metric, n)
        losses = [line.get("loss") for line in lines if "labels" in line]
        costs = [self.metric.cost(p.valid) for p in points]
        reason = reason or diverged(losses, worse_than_base=len(costs) > 1 and costs[-1] > costs[0])
        finished = share >= 1 or (folder / layout.RESULTS).exists()
        state = DIVERGED if reason else FINISHED if finished else GOING
        self.journal.put(trial, Progress(1.0 if state == FINISHED else share, state, points, reason))
        if state != GOING:
            self._forget(trial)


def joined(
    before: Sequence[Point], lines: Sequence[Mapping[str, Any]], metric: Metric, n: int
) -> tuple[Point, ...]:
    """Returns the evaluations of metrics.jsonl after those already known, with the seconds of one of n trials
    that shared them.
    """
    name = f"valid_{metric.name}"
    raw = [Point(line["step"], line[name], line["seconds"]) for line in lines if name in line]
    found = [p for p in before if p.step in {r.step for r in raw}]
    last = max((p.step for p in found), default=-1)
    clock = next((r.seconds for r in reversed(raw) if r.step <= last), 0.0)
    spent = found[-1].seconds if found else 0.0
    later = [Point(r.step, r.valid, spent + (r.seconds - clock) / n) for r in raw if r.step > last]
    return (*found, *later)


def points_of(folder: Path, metric: Metric) -> tuple[Point, ...]:
    """Returns the evaluations of one trial's folder."""
    return joined((), _lines(folder / layout.METRICS), metric, 1)


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _may_share(run: Run) -> bool:
    """Tells if a run's settings allow a pass with others."""
    joint = issubclass(get(run.task), Joint)
    asked = run.compile in ("on", "graphs") or run.cache_frozen or run.neftune or run.trains_base
    return joint and not asked and not run.attention_dropout and not run.options.get("dropout")
