"""`fit`: from a Run to a folder with an adapter, its metrics, and what was learned and forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from veneer import tasks
from veneer.adapt.store import store
from veneer.compress.store import save_quantised
from veneer.data.chat import templates
from veneer.data.order import Order
from veneer.data.pack import Window
from veneer.errors import FormatError, option
from veneer.models import machine, pretrained
from veneer.ops.draws import keyed
from veneer.runs import base_model, card, report
from veneer.runs.learner import OBJECTIVE, in_precision, keeping, learner
from veneer.runs.prepare import NAME, Ready, prepare
from veneer.runs.texts import decided as texts_decided
from veneer.runs.texts import streamed
from veneer.train import full, track
from veneer.train.errors import NotSaved
from veneer.train.folder import drift, layout, lock
from veneer.train.folder.result import Result, figures
from veneer.train.loop.evaluate import sample
from veneer.train.loop.loop import Loop, Pace
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import Stop, Wish, listening
from veneer.train.loop.state import Position
from veneer.train.run import Run
from veneer.train.speed import compiling, frozen_cache


def fit(run: Run, *, progress: bool = True) -> Result:
    """Trains as `run` says, in the folder run.out, and returns what came of it.

    progress: sentences on stderr, and a bar where that is a terminal. Everything is checked before anything is written;
    the errors are those of veneer.errors, and those of veneer.train.errors for trainings that end early, all saved.
    """
    voice = Voice(progress)
    with ExitStack() as stack:
        begun = begin(look(run, voice, stack), voice, stack)
        if isinstance(begun, Result):
            return begun
        wish, loop = stack.enter_context(listening()), loop_of(begun)
        return end(begun, loop, loop.run(wish), wish)


class Begun(NamedTuple):
    """A run whose folder is held by this process, with all that a training needs."""

    ready: Ready
    out: Path
    voice: Voice
    feed: track.Feed


def look(run: Run, voice: Voice, stack: ExitStack) -> Ready:
    """Checks and reads everything, with nothing written yet but the lock of a run that has begun."""
    out = Path(run.out)
    track.check_installed(run.track)
    layout.check_free(out, run.resume)
    device = machine.device(run.device)
    if (out / layout.CONFIG).exists():
        stack.enter_context(lock.held(out))
    stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
    return prepare(run, device, voice)


def begin(ready: Ready, voice: Voice, stack: ExitStack) -> Begun | Result:
    """Makes the run's folder, or goes on in it; its result if it is finished already."""
    out = Path(ready.run.out)
    if not (out / layout.CONFIG).exists():
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.held(out))
        if base_model.start_of(ready.run):
            save_quantised(ready.model, base_model.own_base(ready.run), ready.run.model)
        layout.put(out / layout.CONFIG, ready.config)
        left_out = {part: t.left_out._asdict() for part, t in ready.texts.items() if any(t.left_out)}
        if left_out:
            layout.put(out / layout.LEFT_OUT, left_out)
    else:
        _check_same(out, ready, voice)
        if (out / layout.RESULTS).exists():
            voice.say(f"{out} is finished already; its result is returned as it is")
            return Result.read(out)
    return Begun(
        ready, out, voice, stack.enter_context(track.Feed(ready.run.track, out, ready.config, voice))
    )


def _check_same(out: Path, ready: Ready, voice: Voice) -> None:
    allowed = drift.check_drift(out, ready.config, ready.run.allow)
    for sentence in allowed:
        voice.say(f"differs from how the run began, as allowed: {sentence}")
    if allowed:
        (out / layout.RESULTS).unlink(missing_ok=True)
        layout.put(out / layout.CONFIG, {**ready.config, "allowed": allowed})


def loop_of(begun: Begun) -> Loop:
    """The training, at its beginning or at the newest checkpoint."""
    ready, run = begun.ready, begun.ready.run
    windows = {part: t.windows for part, t in ready.texts.items()}
    torch.manual_seed(int(torch.randint(1 << 62, (), generator=keyed(run.seed, "dropout"))))
    laid, pace = lay_out(run, windows["train"])
    order = (
        streamed.order(run, texts_decided.tokenizer_of(run, Voice(False)), begun.voice)
        if run.stream
        else laid
    )
    measured = {part: sample(w, run.eval_windows) for part, w in windows.items() if part != "train"}
    own = keeping(ready, learner(ready, laid, begun.voice), laid, begun.voice)
    loop = Loop(
        own, order, measured, pace, folder=begun.out, voice=begun.voice, feed=begun.feed, chooses=run.chooses
    )
    loop.begin(run.resume)
    return loop


def end(begun: Begun, loop: Loop, position: Position, wish: Wish) -> Result:
    """The best step's adapter measured, saved, and told of."""
    ready, out, voice, run = begun.ready, begun.out, begun.voice, begun.ready.run
    try:
        loop.take_best()
        with voice.phase("measuring test text"):
            after = {**position.best, **loop.measure([name for name in loop.texts if name == "test"])}
    except Stop:
        raise loop.interrupted() from None
    compiling.restore(ready.model)
    frozen_cache.forget(out)
    _finish(ready, out, position, after, voice)
    if run.report:
        report.at_the_end(
            ready,
            out,
            in_precision(run, tasks.get(OBJECTIVE), next(ready.model.parameters()).device),
            wish,
            voice,
        )
    try:
        card.write(out)
    except OSError as e:
        voice.say(f"the run is finished and saved, but the adapter's {card.CARD} is not written: {e}")
    result = Result.read(out)
    begun.feed.finish(result.metrics)
    return result


def lay_out(run: Run, windows: Sequence[Window]) -> tuple[Order, Pace]:
    """Which windows each step learns from, and when it is evaluated and saved."""
    total = (
        run.steps * run.batch * run.accumulate
        if run.steps
        else max(1, round((run.epochs or 1.0) * len(windows)))
    )
    order = Order(windows, run.batch, run.accumulate, total=total, seed=run.seed, grouped=not run.packing)
    every = run.eval_every or max(1, order.steps // 5)
    warmup = round(run.warmup * order.steps)
    return order, Pace(
        order.steps, run.lr or math.nan, run.schedule, warmup, every, run.save_every or every, run.keep
    )


def _save(model: nn.Module, out: Path, voice: Voice) -> None:
    """The adapter; one that learned nothing somewhere is saved too, and said: a training must not be lost at its end."""
    try:
        store.save(model, out / layout.ADAPTER, NAME)
    except FormatError as e:
        voice.say(f"{e}\nit is saved as it is; loading it needs allow='zero'")
        store.save(model, out / layout.ADAPTER, NAME, allow="zero")


def _finish(ready: Ready, out: Path, position: Position, after: dict[str, float], voice: Voice) -> None:
    run, model = ready.run, ready.model
    if run.trains_base:
        original = pretrained.causal_lm(run.model, torch.float32, torch.device("cpu"))
        full.as_change(model, original.state_dict(), NAME)
    try:
        _save(model, out, voice)
        if (
            "conversations" in ready.texts["train"].facts
        ):  # they were learned in this template, and are to be asked in it
            tokenizer = pretrained.tokenizer(run.model)
            templates.choose(tokenizer, run.chat_template)
            templates.complete(tokenizer).save_pretrained(out / layout.ADAPTER)
    except (OSError, SafetensorError) as e:
        where = out / layout.ADAPTER
        raise NotSaved(
            f"the adapter could not be written to {where}: {e};"
            f" the checkpoints are kept: {option('resume', True)} tries again"
        ) from e
    results = {
        **{name: getattr(run, name) for name in ("model", "method", "optimiser", "lr")},
        **figures(position, after),
        "steps": position.step,
        "best_step": position.best_step,
        "skipped_steps": position.skipped,
        "trainable_parameters": sum(p.parameter.numel() for p in ready.parts),
        "adapter_bytes": sum(p.stat().st_size for p in (out / layout.ADAPTER).glob("*.safetensors")),
        "tokens": position.tokens,
        **{k: ready.config[k] for k in ("start",) if k in ready.config},
        "padding_share": 1 - position.tokens / max(1, position.positions),
        "seconds": position.seconds,
        "peak_memory_bytes": machine.peak_memory(next(model.parameters()).device),
        "notes": voice.said,
        "hardware": machine.hardware(next(model.parameters()).device),
        "versions": machine.versions(),
    }
    layout.put(out / layout.RESULTS, results)
