"""Prepares a run: reads texts, model and settings and checks them against each other; writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import optim, tasks
from veneer.adapt.store import fingerprint
from veneer.adapt.tokens import words
from veneer.data.forms.columns import EMPTY
from veneer.data.order.mapped import Joined
from veneer.data.row_files import Row
from veneer.errors import ConfigError, option
from veneer.models import machine, pretrained
from veneer.optim.base import groups
from veneer.runs import base_model, trained
from veneer.runs.decide import decided
from veneer.runs.shared import Shared, opened
from veneer.runs.starts import calibration, left
from veneer.runs.texts import shards, streamed, texts
from veneer.runs.texts.decided import as_begun, with_length
from veneer.runs.texts.texts import Text
from veneer.runs.trained import NAME as NAME
from veneer.tasks import Task
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.heads import heads
from veneer.train import checks, same_start
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run
from veneer.train.speed import compiling, frozen_blocks, frozen_cache
from veneer.train.speed.frozen_blocks import Prefix
from veneer.train.world import ALONE, World
from veneer.units import size
from veneer.version import __version__


class Ready(NamedTuple):
    """A prepared run. run: with every setting decided; parts: the trained parameters; config: of config.json.

    frozen: the blocks whose hidden states are cached, or None; held: this process has the folder's lock.
    """

    run: Run
    task: Task
    model: nn.Module
    parts: list[groups.Part]
    optimiser: optim.Optimiser
    texts: dict[str, Text]
    config: dict[str, Any]
    frozen: Prefix | None = None
    held: bool = False

    @property
    def trained(self) -> optim.Trained:
        """Returns the parameters as the optimiser takes them."""
        return trained.for_optimiser(self.run, self.parts)


def prepare(
    run: Run,
    device: torch.device,
    voice: Voice,
    *,
    only_shapes: bool = False,
    shared: Shared | None = None,
    world: World = ALONE,
) -> Ready:
    """Reads and checks everything, cheap things first. Raises the errors of what does not fit.

    only_shapes: the trained parameters need not have their starting values, nor the base a fingerprint.
    shared: texts and base of earlier runs of this process. world: the processes that train the run; the first
    one computes its start.
    """
    run = decided(texts.named(run), device)
    _check_size(run, world)
    with voice.phase("reading texts"):
        run, task, found = shared.texts(run, lambda: read(run, voice), voice) if shared else read(run, voice)
    same_start.check_batches(run, task, world)
    with voice.phase("loading the model"):
        place = torch.device("cpu") if run.shard else device  # blocks move one by one, divided
        model, stats = opened(shared, run, task, place, voice, only_shapes=only_shapes)
    task.check(model, Joined(*(t.examples for t in found.values())))
    sha256 = "" if only_shapes else fingerprint.measure(model)["sha256"]
    base = {"model": run.model, "class": type(model).__name__, "sha256": sha256}
    if calibration.needed(run):
        blank = only_shapes or calibration.goes_on(run) or not world.first
        train = None if blank else found["train"].examples
        stats = calibration.statistics(model, run, task, train, voice)
    with voice.phase("starting the adapter"):
        aside = trained.Aside(
            heads(model) if task.NEW_HEAD else [], task.unused(model), base_model.added(run, task)
        )
        parts = trained.open_parameters(model, run, stats, aside)
    begun = {} if only_shapes else left.begun(model, run, stats, voice)
    compiling.recompute(model, run.gradient_checkpointing or run.stream_base)
    prefix = _try_out(model, run, task, found, voice)
    optimiser = optim.make(run.optimiser, **run.optimiser_options)
    _announce(model, run, task, parts, optimiser, found, voice)
    config = _config(run, task, found, {"base": base, **begun, "notes": list(voice.said)})
    own_base = base_model.start_of(run) is not None
    same_start.same_start(model, parts, config, world, own_base=own_base)
    return Ready(run, task, model, parts, optimiser, found, config, prefix)


def _check_size(run: Run, world: World) -> None:
    """Raises ConfigError for settings that need one process, or several."""
    if run.shard and world.size == 1:
        raise ConfigError(f"{option('shard')} divides the base among processes, got 1; use torchrun")
    if run.stream_base and world.size > 1:
        raise ConfigError(f"{option('stream_base')} runs in one process, got {world.size}; use --shard there")


def _config(run: Run, task: Task, found: Mapping[str, Text], more: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of config.json."""
    rendering = task.rendering(found["train"].facts)
    return {
        "veneer": __version__,
        "versions": machine.versions(),
        "run": asdict(run),
        "data": {part: t.facts for part, t in found.items()},
        **({"rendering": rendering} if rendering else {}),
        **more,
    }


def read(run: Run, notes: Notes) -> tuple[Run, Task, dict[str, Text]]:
    """Returns the run with its length decided, its task, and the texts by part, a stream's beginning.

    Raises DataError, ConfigError.
    """
    if shards.is_shards(run.data):
        return _from_shards(run, notes)
    run, task, encoded = encoded_texts(run, notes)
    found = texts.prepare_all(encoded, task, notes)
    return run, task, streamed.begin(found, run, task, notes) if run.stream else found


def _from_shards(run: Run, notes: Notes) -> tuple[Run, Task, dict[str, Text]]:
    """Returns the run with the settings of its token shards, its task, and their texts by part."""
    run = shards.settled(run)
    task = task_of(run)
    found, said = shards.texts_of(run, task)
    for sentence in [*said, f"{run.data[0]}: windows are read from token shards"]:
        notes.say(sentence)
    return run, task.with_reading(run), found


def encoded_texts(
    run: Run, notes: Notes, *, encode: shards.Encode = texts.encode_all
) -> tuple[Run, Task, dict[str, list[Encoded]]]:
    """Returns the run with its length decided, its task, and the rows by part as the task reads them.

    encode: encodes the rows of all parts.
    """
    rows = (streamed if run.stream else texts).gather(run, notes)
    run = as_begun(run)
    run, task = _with_options(run, task_of(run), rows)
    for sentence in task.opening(rows):
        notes.say(sentence)
    if "train" in rows:
        task.check_rows(rows["train"])
    encoded = encode(rows, task)
    run = with_length(run, streamed.looked_at(run, task) if run.stream else encoded["train"], notes)
    return run, task.with_reading(run), encoded


def _with_options(run: Run, task: Task, rows: Mapping[str, list[Row]]) -> tuple[Run, Task]:
    """Returns run and task with the options that the rows to learn decide, a stream's first ones."""
    learned = rows["train"] if "train" in rows else streamed.first_rows(run)
    learned = chain(learned, () if run.valid else rows.get("valid", ()))
    found = task.decided(row for row in learned if row.kind != EMPTY)
    if not found:
        return run, task
    run = replace(run, task_options={**run.task_options, **found})
    return run, tasks.build(run.task, task.processor, run, run.task_options)


def task_of(run: Run) -> Task:
    """Returns the run's task with the model's processor.

    Raises ConfigError if the model lacks one, or if its tokenizer refuses new tokens.
    """
    processor = pretrained.processor(run.model, tasks.get(run.task).PROCESSOR)
    if run.add_tokens:
        words.enter(processor, run.add_tokens)
    return tasks.build(run.task, processor, run, run.task_options)


def _announce(
    model: nn.Module,
    run: Run,
    task: Task,
    parts: list[groups.Part],
    optimiser: optim.Optimiser,
    found: Mapping[str, Text],
    voice: Voice,
) -> None:
    """Reports parameters and texts.

    Builds the optimiser once before anything is written: it may refuse them.
    """
    given = trained.for_optimiser(run, parts)
    optimiser.build(given)
    voice.say(trained.described(model, run, parts))
    if announcement := optimiser.announcement(given):
        voice.say(announcement)
    voice.say("; ".join(texts.counted(part, t.facts, task) for part, t in found.items()))


def _try_out(
    model: nn.Module, run: Run, task: Task, found: Mapping[str, Text], voice: Voice
) -> Prefix | None:
    """Runs the model on a small example.

    Returns the frozen blocks if they are to be cached; raises its errors.
    """
    examples = Joined(*(t.examples for t in found.values()))
    trial, device = task.trial(examples), next(model.parameters()).device
    inputs = task.inputs({k: v.to(device) for k, v in task.collate([trial]).items()})
    if run.trains_base:
        checks.check_leaves(model, inputs)
    else:
        checks.check_called(model, inputs)
    task.check_adapted(model, examples)
    if not run.cache_frozen:
        return None
    if not task.FIXED:
        raise ConfigError(
            f"{option('cache_frozen')} needs a task whose model sees an example alike in every pass, got"
            f" {run.task!r}; leave it out"
        )
    prefix = frozen_blocks.look(model, inputs, task.size(trial))
    needed = prefix.bytes(sum(map(task.size, found["train"].examples)))
    frozen_cache.check_room(Path(run.out), needed)
    voice.say(
        f"the hidden states of the {prefix.first} blocks below the first adapted one are cached until the"
        " end, in"
        f" {size(needed)} on disk"
    )
    return prefix
