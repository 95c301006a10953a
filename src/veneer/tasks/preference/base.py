"""A task that learns from judged answers; known texts are measured beside them, by nats per token."""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapt.attached import adapters
from veneer.data.chat import templates
from veneer.data.pack import Segment, Window
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError, first_few
from veneer.ops.chunked import CHUNK, Kernel
from veneer.tasks.base.abilities import Decoder, Outlined, Surveyed
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, Objective, nothing
from veneer.tasks.preference import answers, shown
from veneer.tasks.preference.scores import base
from veneer.tasks.text import checks, next_token, survey, windows
from veneer.tasks.text.bits import BITS, nats_by_window
from veneer.tasks.text.head import cut
from veneer.tasks.text.padded import check_ids

LOSS = Metric("loss", "loss")
TEXT = "text"
WINDOWS = 24  # of known text that are measured, as of causal-lm
Example = Mapping[str, Tensor]


class Preference(Surveyed, Decoder, Outlined):
    """Answers and a judgement of them. An example is {"prompt" (n,), an answer, ..}, or that of a text."""

    AUTO = "transformers.AutoModelForCausalLM"
    PIPELINE = "text-generation"
    METRIC = LOSS
    SETTINGS: ClassVar[tuple[str, ...]] = ("length", "chat_template", "special_tokens")
    FACTS = ("rows", "examples")
    EVALUATED = 200
    FIXED = False  # a pass of the base and one of the adapted model
    RATE = 0.1  # of the usual rate
    UNLEARNED = ("an empty answer, or equal answers", "remove or correct them")
    REFERENCE: ClassVar[bool] = True  # the loss compares with the base
    ANSWERS: ClassVar[tuple[str, ...]]  # names of an example's answers

    def __init__(self, processor: Any, reading: Reading) -> None:
        super().__init__(processor, reading)
        self.notes = templates.choose(processor, reading.chat_template) if reading.chat_template else []
        self.has_base = True  # the base is at hand, with the adapters off

    @classmethod
    def described(cls, settings: Mapping[str, Any]) -> str:
        return "Of each row the answers are scored behind their prompt, without dropout."

    @property
    def pad(self) -> int:
        """Returns the token that fills the ends of short rows; no label sees it."""
        own = self.processor.pad_token_id
        return 0 if own is None else int(own)

    # -- rows

    @abstractmethod
    def sides(self, row: Row) -> list[Row]:
        """Returns a row for every answer, as a pair of texts or as messages; none if nothing is learned."""

    def check_rows(self, rows: Sequence[Row]) -> None:
        texts = [row.where for row in rows if row.kind == TEXT]
        if texts:
            raise DataError(
                f"columns must be {' or '.join(self._wanted())}, got plain text in {first_few(texts)}; texts"
                " can be given as known= only"
            )

    def _wanted(self) -> list[str]:
        return [" and ".join(names) for kind, names in self.FORMS.items() if kind != TEXT]

    def opening(self, rows: Mapping[str, Sequence[Row]]) -> list[str]:
        mixed = [p for p, some in rows.items() if len({row.kind == TEXT for row in some if row.columns}) > 1]
        if mixed or any(row.kind == TEXT for row in rows.get("valid", ())):
            raise DataError(f"{first_few(mixed) or 'valid'}: must hold judged answers alone, got plain texts")
        every = [row for some in rows.values() for row in some if row.kind != TEXT]
        return [*self.notes, *self._ignored(every)]

    def _ignored(self, rows: Sequence[Row]) -> list[str]:
        """Returns a sentence on rows without anything to learn. A row that cannot be read raises later."""
        found = []
        for row in rows:
            try:
                if row.kind in self.FORMS and not self.sides(row):
                    found.append(row.where)
            except DataError:
                continue
        why = f"{len(found)} rows have an empty answer, or answers that are equal: {first_few(found)}"
        return [why] if found else []

    def encode(self, row: Row) -> Encoded:
        if row.kind == TEXT:
            return windows.encode_row(row, self.reading, self.processor)
        sides = self.sides(row)
        if not sides:
            return Encoded(row, None, 0)
        own = answers.asked(sides, self.reading, self.processor)
        return Encoded(row, own, own.whole)

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        if one.row.kind == TEXT:
            return [_of_segment(s) for s in windows.cut(one, window)]
        return [] if one.content is None else self.judged(one.row, one.content.cut(window))

    def figures(self, every: Sequence[Encoded]) -> dict[str, Any]:
        return survey.figures([shown.as_texts(one) for one in every], self.reading.window)

    def problems(self, every: Sequence[Encoded]) -> dict[str, list[str]]:
        return {}

    def problem(self, problem: str, rows: Sequence[str]) -> str:
        raise NotImplementedError(problem)

    def epoch(self, examples: Sequence[Example], per_step: int) -> dict[str, Any]:
        return shown.epoch(map(self.sequences, examples), self.reading.window, per_step)

    def entries(self, one: Encoded) -> list[dict[str, Any]]:
        names = self.ANSWERS if len(self.ANSWERS) > 1 else ()
        return survey.entries(shown.as_texts(one), self.reading.window, self.processor, names)

    @abstractmethod
    def judged(self, row: Row, own: answers.Asked) -> list[dict[str, Tensor]]:
        """Returns the examples of a row."""

    def evaluated(self, kept: Sequence[Encoded], at_most: int) -> list[Any]:
        if not at_most or not kept or kept[0].row.kind != TEXT:
            return super().evaluated(kept, at_most)
        return super().evaluated(windows.some(kept, min(at_most, WINDOWS), self.reading.window), 0)

    # -- batches

    def sequences(self, example: Example) -> list[tuple[Tensor, Tensor]]:
        """Returns inputs and labels of every answer of an example."""
        if "input_ids" in example:
            return [(example["input_ids"], example["labels"])]
        prompt = example["prompt"]
        return [answers.sequence(prompt, example[n], example[f"{n}_labels"]) for n in self.ANSWERS]

    def size(self, example: Example) -> int:
        return max(len(ids) for ids, _ in self.sequences(example))

    def width(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> int:
        # Every width is compiled twice, for the base and for the adapted model: half of the widths do.
        return super().width(examples, [*widths][::-2])

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        every = [self.sequences(e) for e in examples]
        rows = [some[i] for i in range(len(every[0])) for some in every]  # all of the first answers first
        return answers.stacked(rows, self.width(examples, widths), self.pad)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch["input_ids"], "use_cache": False}

    def tokens(self, batch: Batch) -> Tensor:
        return batch["input_ids"]

    def shape(self, examples: Sequence[Any], rows: int, passes: int) -> Shape:
        found = super().shape(examples, rows, passes)
        n = len(self.ANSWERS)
        learned = sum(int((y >= 0).sum()) for e in examples for _, y in self.sequences(e)) / len(examples)
        return found._replace(rows=n * rows, labels=min(n * rows * found.tokens, math.ceil(rows * learned)))

    # -- model

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        checks.check_length(model, self.reading.window)
        check_ids(model, (ids for e in examples for some in self.sequences(e) for ids in some))

    def check_adapted(self, model: nn.Module, examples: Sequence[Any]) -> None:
        self.has_base = bool(adapters(model))
        if self.REFERENCE and not self.has_base:
            raise ConfigError(
                "method must be an adapter, got 'full': the reference of this task is the model with its"
                " adapters off; use an adapter, or task 'orpo' or 'simpo'"
            )

    def objective(self, kernel: Kernel) -> Objective:
        return functools.partial(self.loss, kernel=kernel)

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, kernel: Kernel | None = None
    ) -> tuple[Tensor, int]: ...

    def body(self, model: nn.Module) -> nn.Module:
        head = cut(model)
        return model if head is None else head.body

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        if self.REFERENCE:
            with base(model):
                next_token.outline(model, shape, device, counted)
        return next_token.outline(model, shape, device, counted)

    def outputs(self, model: nn.Module, shape: Shape) -> int:
        vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        return vocabulary * (min(CHUNK, shape.labels) if cut(model) else shape.rows * shape.tokens)

    # -- figures

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        if not examples:
            raise DataError("the measured text has no example")
        if "input_ids" in examples[0]:
            return of_texts(model, examples, batch, between)
        return self.judgements(model, examples, batch, between)

    @abstractmethod
    def judgements(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
    ) -> list[Figure]:
        """Returns the figures of judged answers, the loss first."""


def _of_segment(s: Segment) -> dict[str, Tensor]:
    return {"input_ids": s.inputs, "labels": s.labels, "n_bytes": s.n_bytes}


def of_texts(model: nn.Module, examples: Sequence[Example], batch: int, between: Between) -> list[Figure]:
    """Returns nats per token as the loss, and bits per byte, of texts."""
    every: list[Window] = [(Segment(e["input_ids"], e["labels"], e["n_bytes"]),) for e in examples]
    nats = nats_by_window(model, every, next_token.nats, batch=batch, between=between)
    labels = torch.tensor([float((e["labels"] >= 0).sum()) for e in examples], dtype=torch.float64)
    n_bytes = torch.tensor([float(e["n_bytes"].sum()) for e in examples], dtype=torch.float64)
    return [Figure.of(LOSS, nats, labels), Figure.of(BITS, nats / math.log(2), n_bytes)]
