"""The training loop: evaluates, saves, steps. A signal saves and stops it; it resumes bit for bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from veneer.data.order.order import Steps
from veneer.errors import DataError, option
from veneer.signals import Stopped
from veneer.tasks import Figure
from veneer.train.errors import Diverged, Interrupted
from veneer.train.folder import checkpoint, owner
from veneer.train.folder.layout import CHECKPOINTS, Metrics, Written
from veneer.train.loop import best, saving, state
from veneer.train.loop.drawing import Drawing
from veneer.train.loop.opening import Opening
from veneer.train.loop.progress import Voice
from veneer.train.loop.schedule import Pace
from veneer.train.loop.signals import Stop, Wish
from veneer.train.loop.state import Position, known
from veneer.train.loop.step import Learner, Outcome
from veneer.train.speed.compiling import eagerly
from veneer.train.track import Feed
from veneer.train.world import in_turn

PATIENCE = 5  # steps in a row that may be skipped
Texts = Mapping[str, Sequence[Any]]


class Loop:
    """One training in one folder. texts: examples to measure by name; "valid" chooses the best step.

    "test" is measured before and after only. precision: context of measurements, such as autocast; chooses:
    False keeps the last step; sample: writes texts after every evaluation; opening: see its class.
    """

    def __init__(
        self,
        learner: Learner,
        order: Steps,
        texts: Texts,
        pace: Pace,
        *,
        folder: Path,
        voice: Voice,
        feed: Feed | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        chooses: bool = True,
        sample: Callable[[], list[dict[str, str]]] | None = None,
        opening: Opening | None = None,
    ) -> None:
        self.learner, self.order, self.texts, self.pace, self.voice = learner, order, texts, pace, voice
        self.world, self.precision, self.chooses, self.sample = learner.world, precision, chooses, sample
        self.drawing = Drawing(learner.task, learner.world)
        self.folder, self.checkpoints = folder, folder / CHECKPOINTS
        self.position, self.wish, self.opening = Position(), Wish(), opening or Opening()
        self.until: int | None = None  # a step to pause at, saved
        self.owners = owner.read(folder)
        self.saved: int | None = None
        self.metrics: Metrics
        self.feed = feed or Feed((), folder, {}, voice)

    def begin(self, resume: bool) -> None:
        """Restores the newest valid checkpoint if there is one, and opens metrics.jsonl and the trackers.

        Raises FormatError if the checkpoint does not fit.
        """
        written = Written()
        if resume:
            with in_turn(self.world):  # the first process sets damaged ones aside before others look
                found, damaged = checkpoint.newest(self.checkpoints)
            for sentence in damaged:
                self.voice.say(sentence)
            if found:
                owner.check(self.checkpoints / f"step-{found.step:06d}", found.meta, self.owners)
                state.restore(self.learner, found)
                self.order.restore(found.tensors)
                self.drawing.restore(found.tensors)
                self.position, written = Position.from_meta(found.meta)
                measured = self.position.evaluated == found.step
                self.saved = found.step if measured or not self.pace.evaluates(found.step) else None
            where = f"resumes at step {self.position.step}"
            self.voice.say(where if found else "no checkpoint to resume from; begins at step 0")
        self.metrics = Metrics(self.folder, written, writes=self.world.first)
        self.feed.start(self.position.step)

    def run(self, wish: Wish) -> Position:
        """Trains to the end. Saves and raises Interrupted after a signal, Diverged after skipped steps."""
        self.wish = wish
        self.world.barrier()
        started = 0.0  # set before the first step, as the evaluation before it may be another training's
        try:
            with self.world.exchange("gather of blocks"), self.voice.bar(self.pace.steps, self.position.step):
                while self.goes_on():
                    started = started or time.monotonic() - self.position.seconds
                    self.agree(wish)
                    back = state.return_point(self.learner, self.order)
                    micro, rate = self.due()
                    before = time.monotonic()
                    self.take(self.learner.step(micro, rate), before, started)
        except Stop:
            raise self.interrupted() from None
        except Stopped:  # within the compilation of a step, which has changed no parameter
            back()
            raise self.interrupted() from None
        finally:
            self.metrics.close()
        return self.position

    def agree(self, wish: Wish) -> None:
        """Raises Stop in all processes if a signal came in any; one that comes meanwhile waits a step."""
        if self.world.sum(wish.number or 0):
            wish.number = wish.number or signal.SIGTERM
            raise Stop

    def interrupted(self) -> Interrupted:
        """Saves a checkpoint unless there is one, and returns the error to raise after a signal."""
        self.save()
        number, p = self.wish.number or 0, self.position
        where = f"stopped by signal {number} after step {p.step} of {self.pace.steps}"
        return Interrupted(f"{where}; saved in {self.folder}: resume with {option('resume', True)}", number)

    def goes_on(self) -> bool:
        """Evaluates and saves if due before the next step; tells if there is a next step."""
        p = self.position
        improved = self.pace.evaluates(p.step) and p.evaluated != p.step and self._evaluate()
        if self.pace.saves(p.step) or improved:
            self.save()
        over = p.step < self.pace.steps and self.pace.is_over(p.step, p.best_step)
        if over:
            self.voice.say(self.pace.why_over(p.step))
        if over or self.paused():
            self.save()
            return False
        return p.step < self.pace.steps

    def paused(self) -> bool:
        """Tells if the training has come to the step to pause at, before its end."""
        p = self.position
        before_the_end = p.step < self.pace.steps and not self.pace.is_over(p.step, p.best_step)
        return self.until is not None and p.step >= self.until and before_the_end

    def due(self) -> tuple[list[list[Any]], float]:
        """Returns this process' micro-batches of the next step, and its rate.

        Raises DataError for a bad row of a stream.
        """
        p, world = self.position, self.world
        try:
            micro = self.drawing.draw(self.order.step(p.step))
        except DataError as e:
            kept = [path.name for path in checkpoint.found(self.checkpoints)]
            then = "start again"
            if kept:
                then = f"resume from {kept[-1]} with {option('resume', True)} {option('allow', 'data')}"
            raise DataError(
                f"{e.text}\nthe training ended after step {p.step} of {self.pace.steps}; "
                f"correct the data and {then}"
            ) from e
        own = self.learner
        return world.shares(micro, own.task.COMPARES, own.idle is not None), self.pace.rate(p.step)

    def take(self, outcome: Outcome, before: float, started: float) -> None:
        """Records a step. before, started: clock seconds at the beginning of the step and of the training."""
        p, now, rate = self.position, time.monotonic(), self.pace.rate(self.position.step)
        p.step, p.tokens, p.seconds = p.step + 1, p.tokens + outcome.tokens, now - started
        p.positions += outcome.positions
        p.skipped_in_a_row = p.skipped_in_a_row + 1 if outcome.skipped else 0
        p.skipped += outcome.skipped is not None
        speed = outcome.tokens / max(now - before, 1e-9)
        self._write(outcome.line(p, rate, speed))
        self.voice.show(p.step, f"loss {outcome.loss:.3f}  {speed:,.0f} tokens/s")
        if p.skipped_in_a_row >= PATIENCE:
            self._give_up(outcome)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.metrics.write(line)
        self.feed.log(line)

    def _give_up(self, outcome: Outcome) -> None:
        p = self.position
        p.skipped_in_a_row = 0  # a resumed run, with other settings, has as many attempts again
        self.save()
        why = (
            f"{PATIENCE} steps in a row were skipped, the last, step {p.step}, because the {outcome.skipped};"
            f" the last good step is saved in {self.folder}. Lower lr (its peak was {self.pace.lr:g}),"
            f" lengthen warmup, or use {option('precision', 'fp32')}"
        )
        raise Diverged(why, self.folder)

    def _evaluate(self) -> bool:
        """Measures the texts; tells if the validation text improved."""
        p = self.position
        names = [name for name in self.texts if name != "test" or p.step == 0]
        figures = self.opening.measured(p.step, lambda: self.measure(names))
        best.check_finite(self, figures)
        named = {f"{text}_{f.name}": known(f.value) for text, some in figures.items() for f in some}
        self._write({"step": p.step, **named, "seconds": p.seconds})
        self._sample()
        p.evaluated = p.step
        if p.step == 0:
            p.keep("before", figures)
        elif p.best_step is None or not self.chooses or figures["valid"][0].beats(p.best["valid"]):
            p.best_step = p.step
            p.keep("best", figures)
            return True
        return False

    def _sample(self) -> None:
        """Adds texts that the model writes to metrics.jsonl, and shows them."""
        if self.sample is None:
            return
        if self.world.first:
            with eagerly(), self.precision(), self._averaged():
                self.learner.model.eval()
                samples = self.sample()
            self.metrics.write({"step": self.position.step, "samples": samples})
            for one in samples:
                self.voice.tell(f"step {self.position.step}: {one['prompt']} ⟦{one['text']}⟧")
        self.world.barrier()

    def _averaged(self) -> AbstractContextManager[Any]:
        """Returns a context in which the running mean, if the training has one, stands for the parameters."""
        return nullcontext() if self.learner.mean is None else self.learner.mean.used()

    def measure(self, names: Sequence[str]) -> dict[str, list[Figure]]:
        """Returns the figures of texts by name, the first process' in all. Raises Stop if a signal comes."""
        figures: dict[str, list[Figure]] = {}
        for name in names:
            self.voice.show(self.position.step, f"{name} text", "measuring")
            own: dict[str, Any] = {"batch": self.order.batch, "between": lambda: self.agree(self.wish)}
            with eagerly(), self.precision(), self._averaged():
                figures[name] = self.learner.task.measure(self.learner.model, self.texts[name], **own)
        return best.shared(figures, self.world)

    def save(self) -> None:
        """Writes a checkpoint of the current step unless there is one. Raises Diverged for NaN parameters."""
        if self.saved != self.position.step:
            saving.save(self)
            self.saved = self.position.step

    def take_best(self) -> None:
        """Restores the trained parameters of the best step, or their running means."""
        best.restore(self)
