"""One training: all settings of `veneer fit`, joined from their parts and checked against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer import methods, optim, settings, tasks
from veneer.data.reading import NO_TEXT, Reading, Texts
from veneer.errors import ConfigError, option
from veneer.methods import inits
from veneer.tasks import Task
from veneer.tasks.base.abilities import Writer
from veneer.tasks.preference.base import Preference
from veneer.train.parts.change import Base, Change
from veneer.train.parts.options import unsuitable
from veneer.train.parts.place import Evaluation, Place, Speed
from veneer.train.parts.steps import Steps, Updates

PARTS: tuple[type[settings.Settings], ...] = (
    Texts,
    Reading,
    Base,
    Change,
    Updates,
    Steps,
    Evaluation,
    Speed,
    Place,
)


@dataclass(frozen=True, kw_only=True)
class Run(Place, Speed, Evaluation, Steps, Updates, Change, Base, Reading, Texts):
    """Settings of one training. Raises ConfigError for all that are unsuitable, alone or together.

    A function that needs one part alone, such as `Reading`, takes a Run for it.
    """

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every problem of a part, then of settings that exclude each other."""
        for part in PARTS:
            yield from part.problems(self)
        yield from _of_task(self)
        yield from _of_speed(self)
        yield from _of_shard(self)
        yield from _of_stream_base(self)
        yield from _of_evaluation(self)
        yield from _of_full(self)
        yield from _of_tokens(self)
        yield from _of_start(self)
        yield from _of_optimiser(self)

    @property
    def base_dtype(self) -> torch.dtype:
        """Returns the dtype that the base's weights are held in, once precision is decided."""
        return torch.bfloat16 if self.precision == "bf16" and not self.trains_base else torch.float32

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """Returns a run from settings by name.

        Raises one ConfigError for all unknown, missing or unsuitable.
        """
        method, optimiser = values.get("method", cls.method), values.get("optimiser", cls.optimiser)
        task = values.get("task", cls.task)
        inside: dict[str, Any] = {
            "options": methods.options_of(methods.get(method)) if method in methods.available() else (),
            "optimiser_options": optim.options_of(optimiser) if optimiser in optim.available() else (),
            "task_options": tasks.options_of(task) if task in tasks.available() else (),
        }
        try:
            return settings.from_dict(cls, values, inside)
        except ConfigError as e:  # without an object options are not checked yet: add their problems
            owners = {"options": f"method {method!r}", "optimiser_options": f"optimiser {optimiser!r}"}
            owners["task_options"] = f"task {task!r}"
            more = [
                sentence
                for key, owner in owners.items()
                if isinstance(values.get(key), Mapping) and inside[key] != ()
                for sentence in unsuitable(owner, values[key], inside[key])
            ]
            raise ConfigError("\n".join(dict.fromkeys([*e.text.splitlines(), *more]))) from None

    @classmethod
    def from_yaml(cls, file: str | Path) -> Run:
        """Returns a run from a YAML file of settings. Raises ConfigError."""
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"{path} does not exist")
        return cls.from_dict(settings.read_yaml(path.read_text(encoding="utf-8"), str(path)))


def _of_task(run: Run) -> Iterator[str]:
    """Yields a sentence for every setting of reading that the task would ignore."""
    if run.task not in tasks.available():
        return
    defaults = settings.table(Run)
    for name in ("train_on", "train_roles", "label_smoothing"):
        if name not in tasks.get(run.task).SETTINGS and getattr(run, name) != defaults[name].default:
            yield f"{name} has no effect on task {run.task!r}; leave it out"


def _of_speed(run: Run) -> Iterator[str]:
    if run.stream and run.steps is None:
        stream, steps = option("stream"), option("steps")
        yield f"{stream} needs {steps}: the length of an epoch is unknown until its end"
    if run.stream and run.cache_frozen:
        cache, stream = option("cache_frozen"), option("stream")
        yield f"{cache} needs all examples at the start, which {stream} lacks; leave one of them out"


def _of_shard(run: Run) -> Iterator[str]:
    if not run.shard:
        return
    own = run.init if run.method in methods.available() else None
    others = {
        "init": own in inits.available() and inits.needs(own).residual,
        "cache_frozen": run.cache_frozen,
        "samples": run.samples > 0,
        "compile": run.compile in ("on", "graphs"),
    }
    for name in (name for name, set_ in others.items() if set_):
        yield f"{option('shard')} needs the whole base for {option(name)}; leave one of them out"
    if run.trains_base:
        yield f"{option('shard')} divides a frozen base, and method 'full' trains it; leave it out"


def _of_stream_base(run: Run) -> Iterator[str]:
    if not run.stream_base:
        return
    base = option("stream_base")
    reads = {
        "shard": (run.shard, "divides a base that is in memory"),
        "samples": (run.samples > 0, "reads the whole base for every token"),
        "compile": (run.compile in ("on", "graphs"), "compiles blocks that are in memory"),
        "cache_frozen": (run.cache_frozen, "runs the blocks of a base that is in memory"),
    }
    for name, (given, why) in reads.items():
        if given:
            yield f"{base} keeps the base on disk, and {option(name)} {why}; leave one of them out"
    if run.trains_base:
        yield f"{base} reads a frozen base, and method 'full' trains it; leave it out, or train an adapter"
    init = run.init if run.method in methods.available() else None
    if init in inits.available() and (inits.needs(init).data or inits.needs(init).residual):
        yield f"{base} starts from weights alone, and {option('init')} {init} needs more; use another start"


def _of_evaluation(run: Run) -> Iterator[str]:
    if run.patience is not None and not run.chooses:
        patience, valid = option("patience"), option("valid", NO_TEXT)
        yield f"{patience} needs valid text to improve on, which {valid} lacks; leave one of them out"
    if run.neftune and run.cache_frozen:
        cache, noise = option("cache_frozen"), option("neftune")
        yield f"{cache} computes embeddings once, and {noise} changes them every step; leave one of them out"
    if run.samples and run.task in tasks.available() and not issubclass(tasks.get(run.task), Writer):
        yield f"{option('samples')}: task {run.task!r} writes no text; leave it out"


def _of_full(run: Run) -> Iterator[str]:
    if not run.trains_base:
        return
    if run.quantise is not None:
        yield (
            f"{option('quantise')} {run.quantise} keeps the base as codes, which method 'full' cannot train;"
            " leave it out, or train an adapter"
        )
    if run.cache_frozen:
        cache = option("cache_frozen")
        yield f"{cache} needs blocks below the first adapted one; method 'full' trains all: leave it out"
    if run.untie:
        untie = option("untie")
        yield f"{untie} is for adapters; method 'full' trains the weight that tied layers share: leave it out"


def _of_tokens(run: Run) -> Iterator[str]:
    """Yields a sentence for every setting that new tokens cannot go with."""
    if not run.add_tokens:
        return
    tokens, advice = option("add_tokens"), "leave one of them out"
    if run.trains_base:
        yield f"{tokens} trains rows beside an adapter; method 'full' trains all rows: leave one of them out"
    if run.cache_frozen:
        yield f"{tokens} changes the embedding, below the blocks of {option('cache_frozen')}; {advice}"
    if run.shard:
        yield f"{tokens} needs the embedding whole, and {option('shard')} divides it; {advice}"
    if run.task not in tasks.available():
        return
    task = tasks.get(run.task)
    if task.PROCESSOR != Task.PROCESSOR:
        yield f"{tokens} needs a task with a tokenizer, which {run.task!r} lacks; {advice}"
    if issubclass(task, Preference) and task.REFERENCE:
        yield (
            f"{tokens}: task {run.task!r} compares with the base, in which the rows of new tokens are zeros;"
            " add them by another task first, and merge"
        )


def _of_start(run: Run) -> Iterator[str]:
    if run.method not in methods.available():
        return
    init = run.init
    if init not in inits.available() or not inits.needs(init).residual:
        return
    if run.quantise is None:
        nf4 = option("quantise", "nf4")
        yield f"{option('init')} {init} compensates for quantisation and needs a quantised base; add {nf4}"
    if run.untie:
        untie = option("untie")
        yield f"{option('init')} {init} is for quantised layers, and tied ones are not; leave {untie} out"


def _of_optimiser(run: Run) -> Iterator[str]:
    if run.optimiser not in optim.available():
        return
    owner = f"optimiser {run.optimiser!r}"
    if run.method in methods.available():
        roles, needed = set(methods.get(run.method).roles.values()), optim.get(run.optimiser).needs
        if missing := sorted(set(needed) - roles):
            yield (
                f"{owner} needs factors {' and '.join(sorted(needed))}, and method {run.method!r} lacks"
                f" {' and '.join(missing)}; use {option('optimiser', 'adamw')}"
            )
    if list(unsuitable(owner, run.optimiser_options, optim.options_of(run.optimiser))):
        return
    try:
        doubts = optim.make(run.optimiser, **run.optimiser_options).doubts
    except ConfigError as e:
        yield f"{owner}: {e.text}"
    else:
        yield from (
            f"{owner}: {sentence}, or pass {option('allow', check)}"
            for check, sentence in doubts.items()
            if check not in run.allow
        )
