"""`veneer eval`: a base and its adapters measured on the same texts and benchmarks, side by side, with how sure it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from veneer import dtypes
from veneer.data.pack import Window, n_bytes
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.models import adapted, machine
from veneer.ops import bootstrap
from veneer.runs.texts import sources, texts
from veneer.train import checks
from veneer.train.loop.evaluate import nats_by_window, sample
from veneer.train.loop.progress import Voice
from veneer.verbs.eval import benchmarks

BASE = "the base"  # as a title: no adapter's name has a space
LENGTH = 256  # as of veneer fit


class Against(NamedTuple):
    """A model with an adapter against its base on the same units.

    low and high: of the difference, 95 %; None where nothing differs, of too few units, and of what is no mean over units.
    """

    value: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """One figure of one text or benchmark; adapters by title. units: what was drawn again for the intervals, and how many."""

    name: str
    metric: str
    lower_is_better: bool
    units: str
    n: int
    base: float
    adapters: dict[str, Against]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "adapters": {title: a._asdict() for title, a in self.adapters.items()}}


@dataclass(frozen=True)
class Evaluation:
    """notes: what to keep in mind when reading the lines."""

    base: str
    lines: list[Line]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {"base": self.base, "lines": [line.as_dict() for line in self.lines], "notes": self.notes}


def evaluate(
    base: str,
    *,
    adapter: Sequence[str] = (),
    data: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_folder: str | None = None,
    length: int | None = None,
    train_on: Literal["completion", "all"] = "completion",
    truncate: bool = False,
    documents: int = 0,
    examples: int = 0,
    shots: int | None = None,
    chat: bool = False,
    batch: int = 8,
    dtype: str = "fp32",
    device: str = "auto",
    seed: int = 0,
    allow: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """The base alone and with each adapter, on every text in bits per byte and on every benchmark in its own measures.

    Everything is compared on the same documents and examples; the intervals come from drawing those again in pairs.

    base: the base model: a Hugging Face folder or id, or builtin
    adapter: FOLDER, NAME=FOLDER or FOLDER@STRENGTH; may be given several times; each is compared with the base alone
    data: texts, as of veneer fit; may be given several times, each is a line
    tasks: benchmarks of lm-eval by name or pattern; may be given several times
    task_folder: folder with tasks of your own, as YAML files of lm-eval
    length: longest window in tokens; 256, or what the model takes, unless given; figures compare only at the same one
    train_on: what of prompts and conversations is measured: completion or all
    truncate: cut prompts and conversations that are longer than length
    documents: at most that many of each text, evenly spaced; 0: all
    examples: at most that many of each benchmark, the first ones; 0: all
    shots: examples shown before each question of a benchmark; its own number unless given
    chat: ask benchmarks through the tokenizer's chat template
    batch: windows or questions in one forward pass
    dtype: of the weights: fp32, bf16 or fp16
    device: cpu, cuda, ..; auto: cuda where there is one
    seed: decides the draws of the intervals
    allow: what to let through when loading, see veneer.load
    """
    _check(
        data,
        tasks,
        length=1 if length is None else length,
        documents=documents,
        examples=examples,
        batch=batch,
    )
    number_format = dtypes.of_name(dtype)
    voice, kept = Voice(progress), Voice(False)  # the one tells how far it is, the other what to keep in mind
    known = benchmarks.find(tasks, task_folder) if tasks else None  # the cheap refusals first
    wanted = adapted.there(adapter)
    rows = {name: sample(sources.rows([name], "test"), documents) for name in data}
    opened = adapted.open_base(base, wanted, number_format, str(machine.device(device)))
    length = length or min(LENGTH, checks.context(opened.model) or LENGTH)
    checks.check_length(opened.model, length)
    adapted.check(opened.model, wanted, allow)
    overlong: Literal["cut", "error"] = "cut" if truncate else "error"
    reading = Reading(length=length, packing=False, train_on=train_on, overlong=overlong)
    read = [_Text.of(name, some, reading, opened, kept) for name, some in rows.items()]
    options = benchmarks.Options(shots, chat, examples or None, batch)
    nats: dict[str, list[Tensor]] = {}
    figures: dict[str, list[benchmarks.Figure]] = {}
    for title, acting in {BASE: None, **{adapted.title(w): w for w in wanted}}.items():
        voice.say(f"measuring {title}: {', '.join([*rows, *(known.names if known else ())])}")
        with adapted.alone(opened.model, acting, allow), voice.phase(f"measuring {title}"):
            nats[title] = [nats_by_window(opened.model, t.windows, batch=batch) for t in read]
            figures[title] = benchmarks.ask(opened.model, opened.tokenizer, known, options) if known else []
    lines = [t.line({title: found[i] for title, found in nats.items()}, seed) for i, t in enumerate(read)]
    lines += _benchmark_lines(figures, seed, kept)
    if any(a.low is not None for line in lines for a in line.adapters.values()):
        kept.say("95 % intervals cover the choice of texts, not of the seed of the training")
    return Evaluation(base, lines, kept.said)


def _check(data: Sequence[str], tasks: Sequence[str], **numbers: int) -> None:
    problems = [] if data or tasks else ["nothing to measure: give texts by --data, or benchmarks by --tasks"]
    problems += [
        f"{name} {n} must be {least} or more"
        for name, n in numbers.items()
        if n < (least := int(name in ("length", "batch")))
    ]
    weighted = [name for name in data if sources.weight(name) != 1]
    problems += [
        f"{name}: a text that is measured has no weight; leave @ and what follows out" for name in weighted
    ]
    if problems:
        raise ConfigError("\n".join(problems))


class _Text(NamedTuple):
    """A text as windows, and the unit (document, or window) that each belongs to."""

    name: str
    windows: list[Window]
    owner: Tensor  # (windows,)
    units: str

    @classmethod
    def of(
        cls, name: str, rows: Sequence[Row], reading: Reading, opened: adapted.Opened, kept: Voice
    ) -> _Text:
        """Raises one DataError for all rows that cannot be measured."""
        whole = texts.by_row(rows, reading, opened.tokenizer, kept, name)
        windows: list[Window] = [(s,) for some in whole for s in some]
        checks.check_vocabulary(opened.model, windows)
        owner = torch.tensor([i for i, some in enumerate(whole) for _ in some])
        if len(whole) >= bootstrap.FEWEST or len(windows) == len(whole):
            return cls(name, windows, owner, "documents")
        kept.say(
            f"{name}: {len(whole)} documents are too few for an interval; it is over their windows, which are less independent"
        )
        return cls(name, windows, torch.arange(len(windows)), "windows")

    def line(self, nats: Mapping[str, Tensor], seed: int) -> Line:
        """The line of the text from the nats of every window (n,) by model."""
        n = int(self.owner.max()) + 1
        weights = _summed(
            torch.tensor([n_bytes([w]) for w in self.windows], dtype=torch.float64), self.owner, n
        )
        if not float(weights.sum()):
            raise DataError(f"{self.name}: the text has no byte that is measured")
        bits = {title: _summed(x, self.owner, n) / math.log(2) for title, x in nats.items()}
        base = bits.pop(BASE)
        against = {title: compare(x, base, weights, seed) for title, x in bits.items()}
        return Line(
            self.name, "bits per byte", True, self.units, n, float(base.sum() / weights.sum()), against
        )


def _summed(x: Tensor, owner: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, owner, x.double())


def compare(adapted: Tensor, base: Tensor, weights: Tensor, seed: int) -> Against:
    """Two models on the same units: their amounts (n,) over the units' weights (n,), and the difference with its interval."""
    total, apart = float(weights.sum()), adapted - base
    found = bootstrap.interval(apart, weights, seed=seed)
    low, high = (
        found if found and bool(apart.any()) else (None, None)
    )  # where nothing differs, drawing again says nothing
    return Against(float(adapted.sum()) / total, float(apart.sum()) / total, low, high)


def _benchmark_lines(found: Mapping[str, list[benchmarks.Figure]], seed: int, kept: Voice) -> Iterator[Line]:
    others = {
        title: {(f.task, f.metric): f for f in figures} for title, figures in found.items() if title != BASE
    }
    for base in found[BASE]:
        against = {}
        for title, figures in others.items():
            own = figures[base.task, base.metric]
            if base.parts is None or own.parts is None or base.weights is None:
                against[title] = Against(own.value, own.value - base.value, None, None)
            else:
                against[title] = compare(own.parts, base.parts, base.weights, seed)
        if against and base.parts is None:
            kept.say(
                f"{base.task} {base.metric}: no interval, as it is made of more than a mean over examples"
            )
        yield Line(base.task, base.metric, base.lower_is_better, "examples", base.n, base.value, against)


def text(found: Evaluation) -> str:
    """The comparison as a table for people."""
    wide = max([len(line.name) for line in found.lines])
    rows = []
    for line in found.lines:
        better = "lower" if line.lower_is_better else "higher"
        told = f"{line.name:<{wide}}  {line.metric} ({better} is better; {line.n:,} {line.units}): base {line.base:.4f}"
        rows.append(told)
        rows += [
            f"{'':<{wide}}    {title} {_told(a, line.lower_is_better)}" for title, a in line.adapters.items()
        ]
    return "\n".join([*rows, *found.notes])


def _told(a: Against, lower_is_better: bool) -> str:
    if a.low is None or a.high is None:
        return f"{a.value:.4f}  difference {a.difference:+.4f}{'' if a.difference else '  nothing differs'}"
    seen = (
        "no difference seen"
        if a.low <= 0 <= a.high
        else "better"
        if (a.high < 0) == lower_is_better
        else "worse"
    )
    return f"{a.value:.4f}  difference {a.difference:+.4f} [{a.low:+.4f}, {a.high:+.4f}]  {seen}"
