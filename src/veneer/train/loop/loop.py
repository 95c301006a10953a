"""The training loop: evaluate, save, step; stopped by a signal it saves first, and resumed it goes on bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from veneer.data.order import Steps
from veneer.data.pack import Window
from veneer.errors import DataError, option
from veneer.train.errors import Diverged, Interrupted
from veneer.train.folder import checkpoint
from veneer.train.folder.layout import CHECKPOINTS, Metrics
from veneer.train.loop import schedule, state
from veneer.train.loop.evaluate import bits_per_byte
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import Stop, Wish
from veneer.train.loop.state import Position
from veneer.train.loop.step import Learner, Outcome
from veneer.train.speed.compiling import eagerly
from veneer.train.track import Feed

PATIENCE = 5  # steps in a row that may be skipped


class Pace(NamedTuple):
    """When what is done. Steps count from 0; lr is the peak."""

    steps: int
    lr: float
    schedule: str
    warmup: int
    eval_every: int
    save_every: int
    keep: int

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.lr * schedule.share(step, self.steps, self.warmup, self.schedule)

    def evaluates(self, step: int) -> bool:
        """Whether texts are measured before this step."""
        return step % self.eval_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due before this step."""
        return step > 0 and (step % self.save_every == 0 or step == self.steps)


class Loop:
    """One training in one folder. texts: what is measured by name; "valid" chooses the best step, "test" waits for the end."""

    def __init__(
        self,
        learner: Learner,
        order: Steps,
        texts: Mapping[str, Sequence[Window]],
        pace: Pace,
        *,
        folder: Path,
        voice: Voice,
        feed: Feed | None = None,
        chooses: bool = True,
    ) -> None:
        self.learner, self.order, self.texts, self.pace, self.voice = learner, order, texts, pace, voice
        self.folder, self.checkpoints = folder, folder / CHECKPOINTS
        self.chooses = chooses  # else the last step is kept
        self.position = Position()
        self.saved: int | None = None
        self.metrics: Metrics
        self.wish = Wish()
        self.feed = feed or Feed((), folder, {}, voice)

    def begin(self, resume: bool) -> None:
        """Opens metrics.jsonl and tells the trackers, and goes on from the newest valid checkpoint if there is one. Raises FormatError."""
        n_bytes = 0
        if resume:
            found, damaged = checkpoint.newest(self.checkpoints)
            for sentence in damaged:
                self.voice.say(sentence)
            if found:
                state.restore(self.learner, found)
                self.order.restore(found.tensors)
                self.position, n_bytes = Position.from_meta(found.meta)
                self.saved = (
                    found.step
                    if self.position.evaluated == found.step or not self.pace.evaluates(found.step)
                    else None
                )
            self.voice.say(
                f"goes on from step {self.position.step}"
                if found
                else "found no checkpoint to go on from; begins at step 0"
            )
        self.metrics = Metrics(self.folder, n_bytes)
        self.feed.start(self.position.step)

    def run(self, wish: Wish) -> Position:
        """Trains to the end. Raises Interrupted after a signal and Diverged after too many skipped steps, once all is saved."""
        self.wish = wish
        started = time.monotonic() - self.position.seconds
        try:
            with self.voice.bar(self.pace.steps, self.position.step):
                while self.goes_on():
                    wish.check()
                    micro, rate = self.due()
                    before = time.monotonic()
                    self.take(self.learner.step(micro, rate), before, started)
        except Stop:
            raise self.interrupted() from None
        finally:
            self.metrics.close()
        return self.position

    def interrupted(self) -> Interrupted:
        """Saves what is not saved yet; the error to raise after a signal."""
        self.save()
        number, p = self.wish.number or 0, self.position
        where = f"stopped by signal {number} after step {p.step} of {self.pace.steps}"
        return Interrupted(
            f"{where}; all is saved in {self.folder}: go on with {option('resume', True)}", number
        )

    def goes_on(self) -> bool:
        """Evaluates and saves what is due before the next step; whether there is one."""
        p, improved = self.position, False
        if self.pace.evaluates(p.step) and p.evaluated != p.step:
            improved = self._evaluate()
        if self.pace.saves(p.step) or improved:
            self.save()
        return p.step < self.pace.steps

    def due(self) -> tuple[list[list[Window]], float]:
        """The micro-batches of the next step, and its rate. Raises DataError for a row of a stream that does not fit."""
        p = self.position
        try:
            return self.order.step(p.step), self.pace.rate(p.step)
        except DataError as e:
            kept = [path.name for path in checkpoint.found(self.checkpoints)]
            then = (
                f"go on from {kept[-1]} with {option('resume', True)} {option('allow', 'data')}"
                if kept
                else "begin anew"
            )
            raise DataError(
                f"{e}\nthis ended the training after step {p.step} of {self.pace.steps}; put it right, and {then}"
            ) from e

    def take(self, outcome: Outcome, before: float, started: float) -> None:
        """Counts and writes down a step that was made. before, started: clock seconds of the step's and the training's beginning."""
        p, now = self.position, time.monotonic()
        rate = self.pace.rate(p.step)
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + outcome.tokens, now - started
        p.positions += outcome.positions
        p.skipped_in_a_row = p.skipped_in_a_row + 1 if outcome.skipped else 0
        p.skipped += outcome.skipped is not None
        speed = outcome.tokens / max(now - before, 1e-9)
        self._write(_line(p, outcome, rate, speed))
        self.voice.show(p.step, f"loss {outcome.loss:.3f}  {speed:,.0f} tokens/s")
        if p.skipped_in_a_row >= PATIENCE:
            self._give_up(outcome)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.metrics.write(line)
        self.feed.log(line)

    def _give_up(self, outcome: Outcome) -> None:
        p = self.position
        p.skipped_in_a_row = 0  # whoever goes on, with other settings, has as many attempts again
        self.save()
        raise Diverged(
            f"{PATIENCE} steps in a row were skipped, the last one, step {p.step}, because the {outcome.skipped}; the state of the last"
            f" good step is saved in {self.folder}. Try a lower lr (its peak was {self.pace.lr:g}), a longer warmup, or precision='fp32'"
        )

    def _evaluate(self) -> bool:
        p = self.position
        figures = self.measure([name for name in self.texts if name != "test" or p.step == 0])
        self._write(
            {"step": p.step, **{f"{name}_bpb": v for name, v in figures.items()}, "seconds": p.seconds}
        )
        p.evaluated = p.step
        if p.step == 0:
            p.before = figures
        elif p.best_step is None or not self.chooses or figures["valid"] < p.best["valid"]:
            p.best_step, p.best = p.step, figures
            return True
        return False

    def measure(self, names: Sequence[str]) -> dict[str, float]:
        """Bits per byte by text. Raises Stop if a signal comes."""
        figures = {}
        for name in names:
            self.voice.show(self.position.step, f"{name} text", "measuring")
            with eagerly():
                figures[name] = bits_per_byte(
                    self.learner.model,
                    self.texts[name],
                    self.learner.objective,
                    batch=self.order.batch,
                    between=self.wish.check,
                )
        return figures

    def save(self) -> None:
        """A checkpoint of where the training stands, unless there is one."""
        p = self.position
        if self.saved == p.step:
            return
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        tensors = {**state.tensors(self.learner), **self.order.state()}
        checkpoint.save(self.checkpoints, p.step, tensors, p.as_meta(self.metrics.sync()))
        checkpoint.prune(self.checkpoints, self.pace.keep, {p.best_step or 0})
        self.saved = p.step

    def take_best(self) -> None:
        """Puts the trained parameters of the best step back, where they are not the last ones."""
        p = self.position
        if p.best_step in (None, p.step):
            return
        path = self.checkpoints / f"step-{p.best_step:06d}"
        problem = checkpoint.damage(path)
        if problem:
            self.voice.say(
                f"the best checkpoint, of step {p.best_step}, is damaged ({problem}); the last step's weights are used"
            )
            p.best_step, p.best = p.step, self.measure([n for n in self.texts if n != "test"])
            return
        state.put_back(self.learner, checkpoint.load(path))


def _line(p: Position, outcome: Outcome, rate: float, speed: float) -> dict[str, float | int | str | None]:
    shown = {"loss": outcome.loss, "gradient_norm": outcome.norm}
    line = {k: None if outcome.skipped else v for k, v in shown.items()}
    return {
        "step": p.step,
        **line,
        "lr": rate,
        "labels": outcome.labels,
        "tokens": p.tokens,
        **({"skipped": outcome.skipped} if outcome.skipped else {}),
        "seconds": p.seconds,
        "tokens_per_second": speed,
    }
