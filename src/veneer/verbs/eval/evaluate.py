"""`veneer eval`: measures a base and its adapters on the same texts and benchmarks, side by side, with
intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import nn

from veneer import dtypes
from veneer.adapt.store.folder import adapter_folder
from veneer.data.forms.columns import EMPTY
from veneer.data.forms.shape import Shape
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.errors import ConfigError
from veneer.models import adapted, machine
from veneer.runs.texts import sources
from veneer.tasks import DEFAULT, Figure, Say, Task, build, get
from veneer.tasks.text.checks import context
from veneer.train.folder import task_record
from veneer.train.loop.progress import Notes, Voice
from veneer.verbs.eval import benchmarks
from veneer.verbs.eval.lines import BASE, Evaluation, Line, line, text
from veneer.verbs.eval.measured import MeasuredText

__all__ = ["evaluate", "text"]
LENGTH = 256  # as of veneer fit


def evaluate(
    base: str,
    *,
    adapter: Sequence[str] = (),
    data: Sequence[str] = (),
    task: str = DEFAULT,
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    length: int | None = None,
    train_on: Literal["completion", "all"] = "completion",
    overlong: Literal["drop", "cut", "error"] = "error",
    documents: int = 0,
    examples: int = 0,
    shots: int | None = None,
    chat: bool = False,
    batch: int = 8,
    dtype: str = "fp32",
    device: str = "auto",
    stream_base: bool = False,
    seed: int = 0,
    allow: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Measures the base alone and with each adapter on every text and every benchmark.

    All are compared on the same documents and examples; the intervals come from paired resampling of these.

    base: the base model: a Hugging Face folder or id, or builtin
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times; compared with the base
    data: texts, as of veneer fit; may be given several times, each is a line
    tasks: benchmarks of lm-eval by name or pattern; may be given several times
    task_folder: folder with tasks of your own, as YAML files of lm-eval
    task: task whose figures are measured on texts
    length: longest window in tokens; 256, or the model's longest, unless given; compare equal lengths only
    train_on: part of prompts and conversations to measure: completion or all
    overlong: rows longer than length: drop them, cut their ends, or error
    documents: at most that many of each text, evenly spaced; 0: all
    examples: at most that many of each benchmark, the first ones; 0: all
    shots: examples shown before each question of a benchmark; its own number unless given
    chat: ask benchmarks through the tokenizer's chat template
    batch: windows or questions in one forward pass
    dtype: of the weights: fp32, bf16 or fp16
    device: cpu, cuda, ..; auto: cuda where there is one
    stream_base: leave the base on disk, one block at a time in memory; each batch reads the whole base
    seed: decides the draws of the intervals
    allow: checks to turn off when loading, see veneer.load
    """
    numbers = {"length": 1 if length is None else length, "batch": batch}
    _check(data, tasks, {"documents": documents, "examples": examples}, numbers)
    kind, number_format, notes = get(task), dtypes.of_name(dtype), Notes()
    known = benchmarks.find(tasks, task_folder) if tasks else None  # cheap refusals first
    wanted, shape = adapted.there(adapter), Shape(forms=kind.FORMS, media=kind.MEDIA)
    rows = {name: spread(sources.rows([name], "test", shape=shape), documents) for name in data}
    reading = Reading(length=length or LENGTH, packing=False, train_on=train_on, overlong=overlong)
    asked = _task(task, adapted.processor(base, wanted, kind.PROCESSOR), reading, wanted, rows)
    opened = adapted.open_base(
        base, wanted, number_format, str(machine.device(device)), asked, stream=stream_base
    )
    length = length or min(LENGTH, context(opened.model) or LENGTH)
    asked = asked.with_reading(replace(reading, length=length))
    adapted.check(opened.model, wanted, allow)
    read, options = _texts(rows, asked, opened.model, notes), _options(shots, chat, examples, batch)
    found = _measured(opened, wanted, read, known, options, allow, Voice(progress))
    return Evaluation(base, _lines(read, found, seed, notes), notes.said)


def _options(shots: int | None, chat: bool, examples: int, batch: int) -> benchmarks.Options:
    return benchmarks.Options(shots, chat, examples or None, batch)


def _check(
    data: Sequence[str], tasks: Sequence[str], least_0: Mapping[str, int], least_1: Mapping[str, int]
) -> None:
    problems = [] if data or tasks else ["nothing to measure: give texts by --data, or benchmarks by --tasks"]
    for least, numbers in enumerate((least_0, least_1)):
        problems += [f"{name} must be {least} or more, got {n}" for name, n in numbers.items() if n < least]
    problems += sources.weighted(data, "data")
    if problems:
        raise ConfigError("\n".join(problems))


def _task(
    name: str,
    processor: Any,
    reading: Reading,
    wanted: Sequence[adapted.Wanted],
    rows: Mapping[str, Sequence[Row]],
) -> Task:
    """Returns the task with the options that the adapters were trained with, or else that the texts decide.

    Raises ConfigError for adapters of several options.
    """
    found = [task_record.read(adapter_folder(w.folder)) for w in wanted]
    trained = [options for task, options in found if task == name]
    if any(options != trained[0] for options in trained):
        raise ConfigError(
            f"the adapters' options of task {name!r} must be alike, got {trained}; measure them apart"
        )
    task = build(name, processor, reading, trained[0] if trained else {})
    learned = [row for some in rows.values() for row in some if row.kind != EMPTY]
    decided = {} if trained else task.decided(learned)
    return build(name, processor, reading, decided) if decided else task


def _texts(
    rows: Mapping[str, Sequence[Row]], task: Task, model: nn.Module, notes: Notes
) -> list[MeasuredText]:
    return [MeasuredText.of(name, some, task, model, notes) for name, some in rows.items()]


def _lines(read: Sequence[MeasuredText], found: _Found, seed: int, notes: Notes) -> list[Line]:
    lines = [each for i, t in enumerate(read) for each in t.lines(found.texts(i), seed)]
    lines += _benchmark_lines(found.benchmarks, seed, notes.say)
    if any(a.low is not None for each in lines for a in each.adapters.values()):
        notes.say("95 % intervals cover the choice of texts, not of the seed of the training")
    return lines


class _Found(NamedTuple):
    """Figures by title of the model: of every text in order, and of all benchmarks."""

    by_text: dict[str, list[list[Figure]]]
    benchmarks: dict[str, list[benchmarks.Answered]]

    def texts(self, i: int) -> dict[str, list[Figure]]:
        """Returns the figures of text i by title."""
        return {title: found[i] for title, found in self.by_text.items()}


def _measured(
    opened: adapted.Opened,
    wanted: Sequence[adapted.Wanted],
    read: Sequence[MeasuredText],
    known: benchmarks.Known | None,
    options: benchmarks.Options,
    allow: Sequence[str],
    voice: Voice,
) -> _Found:
    """Measures the base and every adapter alone."""
    found = _Found({}, {})
    names = [*(t.name for t in read), *(known.names if known else ())]
    for title, acting in {BASE: None, **{adapted.title(w): w for w in wanted}}.items():
        voice.say(f"measuring {title}: {', '.join(names)}")
        with adapted.alone(opened.model, acting, allow), voice.phase(f"measuring {title}"):
            found.by_text[title] = [t.measure(opened.model, options.batch) for t in read]
            asked = benchmarks.ask(opened.model, opened.tokenizer, known, options) if known else []
            found.benchmarks[title] = asked
    return found


def _benchmark_lines(
    found: Mapping[str, Sequence[benchmarks.Answered]], seed: int, say: Say
) -> Iterator[Line]:
    named = {title: {(a.task, a.figure.name): a.figure for a in some} for title, some in found.items()}
    for base in found[BASE]:
        own = {title: figures[base.task, base.figure.name] for title, figures in named.items()}
        if len(own) > 1 and base.figure.parts is None:
            name = f"{base.task} {base.figure.name}"
            say(f"{name}: without an interval, because it is not a mean over examples")
        yield line(base.task, "examples", base.n, own, seed)
