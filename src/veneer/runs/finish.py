"""Finishes a run: restores the best step, saves the adapter, results.json, report and card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import disk
from veneer.adapt.store import store
from veneer.compress.trp import runs as trp
from veneer.errors import FormatError, NotWritten, option
from veneer.models import machine
from veneer.models.of_task import for_task
from veneer.runs import card, divided, report
from veneer.runs.prepare import NAME, Ready
from veneer.tasks import Figure
from veneer.train import full, track
from veneer.train.errors import NotSaved
from veneer.train.folder import layout, task_record
from veneer.train.folder.result import Result, figures
from veneer.train.loop.loop import Loop
from veneer.train.loop.progress import Voice
from veneer.train.loop.signals import Stop, Wish
from veneer.train.loop.state import Position
from veneer.train.speed import compiling, frozen_cache
from veneer.train.world import ALONE, World


class Begun(NamedTuple):
    """A run whose folder is held by this process, with all that a training needs."""

    ready: Ready
    out: Path
    voice: Voice
    feed: track.Feed
    world: World = ALONE


def end(begun: Begun, loop: Loop, position: Position, wish: Wish) -> Result:
    """Evaluates, saves and reports the best step's adapter."""
    ready, out, voice = begun.ready, begun.out, begun.voice
    try:
        loop.take_best()
        trp.project(ready.model, loop.learner.optimiser, ready.run)
        with voice.phase("measuring test text"):
            test = _finite(loop.measure([name for name in loop.texts if name == "test"]), voice)
    except Stop:
        raise loop.interrupted() from None
    compiling.restore(ready.model)
    if begun.world.first:
        whole = begun._replace(ready=divided.whole(ready)) if ready.run.shard else begun
        _write(whole, loop, position, test, wish)
    begun.world.barrier()
    result = Result.read(out)
    begun.feed.finish(result.metrics)
    return result


def _finite(test: Mapping[str, Sequence[Figure]], voice: Voice) -> dict[str, Sequence[Figure]]:
    """Returns the texts whose metric is a number: the training is over, and its adapter is kept."""
    for name, some in test.items():
        if not math.isfinite(some[0].value):
            voice.say(
                f"{some[0].metric.words} of {name} text is {some[0].value}, and left out of the results"
            )
    return {name: some for name, some in test.items() if math.isfinite(some[0].value)}


def _write(
    begun: Begun, loop: Loop, position: Position, test: Mapping[str, Sequence[Figure]], wish: Wish
) -> None:
    """Writes adapter, results, report and card."""
    ready, out, voice = begun.ready, begun.out, begun.voice
    frozen_cache.forget(out)
    trp.write(ready.model, out, ready.run, ready.task.processor)
    _save(ready, out, voice)
    layout.put(out / layout.RESULTS, _results(ready, out, position, test, voice))
    if ready.run.report and ready.run.stream_base:
        voice.say(f"the report needs the base in memory: veneer report {out} --measure writes it there")
    elif ready.run.report:
        report.at_the_end(ready, out, loop.precision, wish, voice)
    _write_card(out, voice)


def _write_card(out: Path, voice: Voice) -> None:
    try:
        card.write(out)
    except (OSError, NotWritten) as e:
        voice.say(f"the run is finished and saved, but the adapter's {card.CARD} is not written: {e}")


def made_up(ready: Ready, out: Path, voice: Voice) -> None:
    """Writes the report and the card of a finished run whose end was interrupted before them."""
    if ready.run.report and not ready.run.stream_base and not (out / report.page.REPORT).exists():
        voice.say(f"{out} lacks its report, which is written now")
        report.made_up(out, voice)
    if not (out / layout.ADAPTER / card.CARD).exists():
        _write_card(out, voice)


def _save(ready: Ready, out: Path, voice: Voice) -> None:
    """Writes the adapter, and the processor if it belongs to the adapter. Raises NotSaved."""
    run, model, where = ready.run, ready.model, out / layout.ADAPTER
    if run.trains_base:
        original = for_task(run.model, ready.task, torch.float32, torch.device("cpu"))
        full.as_change(model, original.state_dict(), NAME)
    try:
        _save_adapter(model, where, voice)
        task_record.write(where, run.task, run.task_options)
        processor = ready.task.companion(ready.texts["train"].facts)
        if processor is None and run.add_tokens:
            processor = ready.task.processor
        if processor is not None:
            processor.save_pretrained(where)
    except Exception as e:  # every library has its own for a full disk
        if not isinstance(e, OSError | NotWritten) and disk.fault(e) is None:
            raise
        raise NotSaved(
            f"the adapter could not be written to {where}: {e}; the checkpoints are kept:"
            f" {option('resume', True)} tries again"
        ) from e


def _save_adapter(model: nn.Module, where: Path, voice: Voice) -> None:
    """Writes the adapter, even if parts learned nothing: a training must not be lost at its end."""
    try:
        store.save(model, where, NAME)
    except FormatError as e:
        voice.say(f"{e}\nthe adapter is saved unchanged; loading it needs {option('allow', 'zero')}")
        store.save(model, where, NAME, allow="zero")


def _results(
    ready: Ready, out: Path, position: Position, test: Mapping[str, Sequence[Figure]], voice: Voice
) -> dict[str, Any]:
    """Returns the content of results.json."""
    device = next(ready.model.parameters()).device
    adapter = (out / layout.ADAPTER).glob("*.safetensors")
    return {
        **{name: getattr(ready.run, name) for name in ("model", "method", "optimiser", "lr")},
        **figures(ready.task.METRIC, position, test),
        "steps": position.step,
        "best_step": position.best_step,
        "skipped_steps": position.skipped,
        "trainable_parameters": sum(p.parameter.numel() for p in ready.parts),
        "adapter_bytes": sum(p.stat().st_size for p in adapter),
        "tokens": position.tokens,
        **{k: ready.config[k] for k in ("start",) if k in ready.config},
        "padding_share": 1 - position.tokens / max(1, position.positions),
        "seconds": position.seconds,
        "peak_memory_bytes": machine.peak_memory(device),
        "notes": voice.said,
        "hardware": machine.hardware(device),
        "versions": machine.versions(),
    }
