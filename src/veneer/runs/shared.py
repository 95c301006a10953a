"""Shares texts, the base and first evaluations among the runs of one process, each made once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn

from veneer.adapt import attached
from veneer.adapt.store import fingerprint
from veneer.data.reading import Reading
from veneer.methods import Stats
from veneer.models.of_task import for_task
from veneer.runs import base_model
from veneer.runs.texts.texts import Text
from veneer.tasks import Task
from veneer.train.loop.opening import Opening
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run

# Settings that neither the start of an adapter nor an evaluation depends on.
OF_LENGTH = ("lr", "out", "eval_every", "save_every", "keep", "resume", "report", "track", "allow", "compile")
Read = tuple[Run, Task, dict[str, Text]]
# Settings that decide what is read, beside those of Reading.
OF_TEXTS = (
    *("model", "task", "task_options", "add_tokens", "data", "valid", "test", "known", "seed"),
    *("eval_windows", "chooses", *(f.name for f in fields(Reading))),
)


class Shared:
    """Keeps texts, the base, and the evaluation before the first step of every start."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[Read, list[str]]] = {}
        self._bases: dict[str, tuple[nn.Module, str]] = {}
        self._openings: dict[str, Opening] = {}

    def texts(self, run: Run, read: Callable[[], Read], notes: Notes) -> Read:
        """Returns the run, its task and texts; runs that read alike read once, and each takes the notes."""
        if run.stream:  # a stream is used up by its run
            return read()
        key = repr([getattr(run, name) for name in OF_TEXTS])
        if key not in self._texts:
            before = len(notes.said)
            self._texts[key] = read(), notes.said[before:]
        else:
            for sentence in self._texts[key][1]:
                notes.say(sentence)
        known, task, found = self._texts[key][0]
        decided = {name: getattr(known, name) for name in ("length", "special_tokens", "task_options")}
        return replace(run, **decided), task, found

    def base(self, run: Run, task: Task, dtype: torch.dtype, device: torch.device) -> nn.Module | None:
        """Returns a model of its own on the weights that all runs share, None for a run that changes them.

        The base is loaded again if its weights were written to since.
        """
        elsewhere = run.shard or run.stream_base
        if run.trains_base or run.quantise or run.add_tokens or elsewhere or task.NEW_HEAD:
            return None
        key = repr((run.model, run.task, sorted(run.task_options.items()), dtype, device))
        held = self._bases.get(key)
        if held is None or fingerprint.measure(held[0])["sha256"] != held[1]:
            model = for_task(run.model, task, dtype, device)
            held = self._bases[key] = (model, fingerprint.measure(model)["sha256"])
        return on_weights_of(held[0])

    def opening(self, run: Run) -> Opening:
        """Returns the evaluation before the first step that runs with this start share."""
        settings = {name: value for name, value in asdict(run).items() if name not in OF_LENGTH}
        return self._openings.setdefault(repr(sorted(settings.items())), Opening())


def opened(
    shared: Shared | None, run: Run, task: Task, device: torch.device, voice: Voice, *, only_shapes: bool
) -> tuple[nn.Module, Mapping[str, Stats] | None]:
    """Returns the base of a run, on shared weights where it can be, and statistics; see `base_model.base`."""
    kept = shared.base(run, task, run.base_dtype, device) if shared else None
    if kept is not None:
        return kept, None
    return base_model.base(run, task, run.base_dtype, device, voice, only_shapes=only_shapes)


def on_weights_of(model: nn.Module) -> nn.Module:
    """Returns a copy of the model on the same parameters and buffers, which take no further memory."""
    held: Mapping[int, Any] = {
        id(t): t for t in [*attached.base_parameters(model).values(), *model.buffers()]
    }
    return copy.deepcopy(model, dict(held))
