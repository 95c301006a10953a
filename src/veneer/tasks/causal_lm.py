"""Causal language modelling: the cross-entropy of the next token, over the positions that carry a label."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.data import pack
from veneer.data.chat import templates
from veneer.data.order.streamed import Joiner
from veneer.data.pack import Packer, Segment, Window
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import first_few
from veneer.ops.chunked import CHUNK, Kernel
from veneer.tasks.base.abilities import Asked, Decoder, Joint, Outlined, Previewed, Surveyed, Writer
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.single import Single
from veneer.tasks.base.task import Batch, Between, Objective, nothing
from veneer.tasks.text import checks, next_token, special_names, survey, windows
from veneer.tasks.text.answering import short_answers
from veneer.tasks.text.bits import BITS, bits_per_byte, nats_by_window
from veneer.tasks.text.head import cut
from veneer.tasks.text.preview import preview
from veneer.tasks.text.samples import SAMPLES, continuation, prompts, written

TEMPERATURE = 0.7  # of samples
TRIED = 32  # tokens of dry runs


class CausalLM(Surveyed, Decoder, Joint, Outlined, Previewed, Writer, Asked):
    """Next-token prediction, measured in bits per byte. Examples are windows of one or more texts."""

    AUTO = "transformers.AutoModelForCausalLM"
    PIPELINE = "text-generation"
    METRIC: ClassVar[Metric] = BITS
    SETTINGS: ClassVar[tuple[str, ...]] = (
        "length",
        "packing",
        "train_on",
        "train_roles",
        "train_turns",
        "chat_template",
        "special_tokens",
        "label_smoothing",
    )
    FACTS = ("rows", "windows", "tokens", "learned_tokens")
    EXAMPLE = "window"
    EVALUATED = 24

    def __init__(self, processor: Any, reading: Reading) -> None:
        super().__init__(processor, reading)
        self.notes = templates.choose(processor, reading.chat_template) if reading.chat_template else []

    @classmethod
    def described(cls, settings: Mapping[str, Any]) -> str:
        if settings["train_on"] == "all":
            return "Every token is learned."
        roles = ", ".join(settings["train_roles"])
        return f"Of prompts and conversations only completions and the turns of {roles} are learned."

    @property
    def pad(self) -> int:
        """Returns the token that fills the ends of short rows; no label sees it."""
        own = self.processor.pad_token_id
        return 0 if own is None else int(own)

    def check_rows(self, rows: Sequence[Row]) -> None:
        windows.check_roles(rows, self.reading.train_roles)

    def opening(self, rows: Mapping[str, Sequence[Row]]) -> list[str]:
        every = (row for some in rows.values() for row in some)
        spelt = special_names.opening(rows, self.reading, self.processor)
        return [*self.notes, *windows.opening(every, self.processor), *spelt]

    def encode(self, row: Row) -> Encoded:
        return windows.encode_row(row, self.reading, self.processor)

    def pieces(self, one: Encoded, window: int) -> list[Segment]:
        return windows.cut(one, window)

    def remarks(self, kept: Sequence[Encoded]) -> list[str]:
        n = sum(windows.is_endless(one, self.processor, self.reading) for one in kept)
        markers = "the chat template's markers leave it out"
        return [f"in {n} conversations no end of a turn is learned: {markers}"] if n else []

    def figures(self, every: Sequence[Encoded]) -> dict[str, Any]:
        return survey.figures(every, self.reading.window)

    def problems(self, every: Sequence[Encoded]) -> dict[str, list[str]]:
        endless = [one.row.where for one in every if windows.is_endless(one, self.processor, self.reading)]
        return {"endless": endless}

    def problem(self, problem: str, rows: Sequence[str]) -> str:
        return (
            f"in {len(rows)} conversations no end of a turn is learned: {first_few(rows)};"
            f" the markers of the chat template should include it"
        )

    def epoch(self, examples: Sequence[Window], per_step: int) -> dict[str, Any]:
        return survey.epoch(examples, self.reading.window, per_step)

    def entries(self, one: Encoded) -> list[dict[str, Any]]:
        return survey.entries(one, self.reading.window, self.processor)

    def evaluated(self, kept: Sequence[Encoded], at_most: int) -> list[Window]:
        has_text = any(one.whole is None for one in kept)
        if at_most == 0 or (has_text and self.reading.eval_by == "windows"):
            return super().evaluated(kept, at_most)
        return super().evaluated(windows.some(kept, at_most, self.reading.window), 0)

    def answers(self, model: nn.Module, examples: Sequence[Window], *, batch: int) -> list[dict[str, Any]]:
        return short_answers(model, self.processor, examples, batch=batch)

    def joiner(self, still_open: Iterable[Window] = ()) -> Joiner:
        return Packer(self.reading.window, still_open) if self.reading.packing else Alone()

    def filled(self, pieces: Sequence[Segment]) -> float:
        packed = sum(len(s.inputs) for s in pieces) / self.reading.window
        return packed if self.reading.packing else len(pieces)

    def trial(self, examples: Sequence[Window]) -> Window:
        return (Segment(*(t[:TRIED] for t in examples[0][0])),)

    def as_tensors(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        return windows.as_tensors(examples)

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> list[Window]:
        return windows.from_tensors(tensors)

    def facts(
        self, rows: Sequence[Row], pieces: Sequence[Segment], examples: Sequence[Window]
    ) -> dict[str, Any]:
        return windows.facts(rows, pieces, examples)

    def companion(self, facts: Mapping[str, Any]) -> Any:
        # Conversations were learned in this template, and must be asked in it.
        return templates.complete(self.processor) if "conversations" in facts else None

    def rendering(self, facts: Mapping[str, Any]) -> str:
        if "conversations" not in facts:
            return ""
        own = templates.described(self.processor, self.reading.chat_template)
        return f"Conversations are rendered by {own}, which is saved with the adapter."

    def size(self, example: Window) -> int:
        return pack.n_tokens([example])

    def labels(self, example: Window) -> int:
        return pack.n_labels([example])

    def collate(self, examples: Sequence[Window], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        return pack.collate(examples, self.pad, widths)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return next_token.inputs(batch)

    def shape(self, examples: Sequence[Window], rows: int, passes: int) -> Shape:
        found = super().shape(examples, rows, passes)
        packed = any(len(w) > 1 for w in examples)
        return found._replace(labels=min(rows * found.tokens, found.labels), packed=packed)

    def check(self, model: nn.Module, examples: Sequence[Window]) -> None:
        checks.check_length(model, self.reading.window)
        checks.check_vocabulary(model, examples)

    def check_adapted(self, model: nn.Module, examples: Sequence[Window]) -> None:
        if any(len(w) > 1 for w in examples):
            checks.check_packing(model)

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        return next_token.loss(model, batch, smoothing=smoothing)

    def objective(self, kernel: Kernel) -> Objective:
        return functools.partial(next_token.loss, kernel=kernel)

    def losses(
        self, model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: Sequence[float]
    ) -> list[Tensor]:
        return next_token.losses(model, batch, rows, smoothing)

    def body(self, model: nn.Module) -> nn.Module:
        head = cut(model)
        return model if head is None else head.body

    def tokens(self, batch: Batch) -> Tensor:
        return batch["input_ids"]

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Window],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        if not each:
            value = bits_per_byte(model, examples, self.loss, batch=batch, between=between)
            return [Figure(BITS.name, value, BITS.unit)]
        parts = nats_by_window(model, examples, next_token.nats, batch=batch, between=between) / math.log(2)
        weights = torch.tensor([pack.n_bytes([w]) for w in examples], dtype=torch.float64)
        return [Figure.of(BITS, parts, weights)]

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        return next_token.outline(model, shape, device, counted)

    def outputs(self, model: nn.Module, shape: Shape) -> int:
        vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        rows = min(CHUNK, shape.labels) if cut(model) is not None else shape.rows * shape.tokens
        return rows * vocabulary

    def preview(self, examples: Sequence[Window]) -> list[list[list[Any]]]:
        return preview(examples, self.processor)

    def prompts(self, model: nn.Module, examples: Sequence[Window], n: int = SAMPLES) -> list[dict[str, str]]:
        return prompts(model, examples, self.processor, n)

    def write(self, model: nn.Module, prompt: str, *, seed: int) -> str:
        options: dict[str, Any] = {"top_p": 0.95, "max_new_tokens": written(model)}
        return continuation(model, self.processor, prompt, seed=seed, temperature=TEMPERATURE, **options)

    def writing(self, model: nn.Module) -> Mapping[str, Any]:
        return {"temperature": TEMPERATURE, "tokens": written(model)}


class Alone(Single):
    """Makes every segment a window of its own."""

    def add(self, piece: Segment) -> Window:
        """Returns the window."""
        return (piece,)
