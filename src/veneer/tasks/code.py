"""Programs from prompts, learned as language modelling and measured by the tests that they pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError
from veneer.tasks.base.abilities import Examined, Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, batches, nothing
from veneer.tasks.measures import programs
from veneer.tasks.text import next_token
from veneer.tasks.text.answering import Question, asked, text_of
from veneer.tasks.text.padded import IGNORED, Padded, check_ids
from veneer.tasks.text.padded import text_of as column

FURTHER, WORST, SHOWN = (
    32,
    8,
    600,
)  # tokens beyond the true program; failures in the report; characters of one


class Code(Padded, Outlined, Examined):
    """Prompts with programs and tests, measured by pass@k: the chance that one of k programs passes its test.

    The model's programs run in processes of their own with limits, without network.

    k: programs of which one must pass
    samples: programs drawn for each prompt, k or more; 1: the likeliest one
    temperature: of drawn programs
    seconds: that a program and its test may take
    """

    AUTO = "transformers.AutoModelForCausalLM"
    PIPELINE = "text-generation"
    METRIC: ClassVar[Metric] = Metric("pass", "pass@k", lower_is_better=False)
    FORMS = {
        "tested": ("prompt", "completion", "test"),
        "human-eval": ("prompt", "canonical_solution", "test", "entry_point"),
    }
    SETTINGS = ("length", "label_smoothing")
    EVALUATED = 24

    def __init__(
        self,
        processor: Any,
        reading: Reading,
        *,
        k: int = 1,
        samples: int = 1,
        temperature: float = 0.8,
        seconds: float = 5.0,
    ) -> None:
        super().__init__(processor, reading)
        if not 1 <= k <= samples:
            raise ConfigError(f"samples must be k ({k}) or more, got {samples}")
        if temperature <= 0 or seconds <= 0:
            raise ConfigError(f"temperature and seconds must be above 0, got {temperature:g} and {seconds:g}")
        self.k, self.samples, self.temperature, self.seconds = k, samples, temperature, seconds

    def encode(self, row: Row) -> Encoded:
        texts = [column(row, name) for name in self.FORMS[row.kind]]
        prompt, completion, test = texts[:3]
        if row.kind == "human-eval":
            test = f"{test}\ncheck({texts[3]})"
        first = self.processor(prompt, verbose=False)["input_ids"]
        ids = [*first, *self.processor(completion, add_special_tokens=False, verbose=False)["input_ids"]]
        end = self.processor.eos_token_id
        ids += [] if end is None else [end]
        inputs, labels = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
        labels[: max(0, len(first) - 1)] = IGNORED
        content = {"input_ids": inputs, "labels": labels, "test": _bytes(test), "prompt": _bytes(prompt)}
        return Encoded(row, content, len(inputs))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        cut = {**one.content, **{name: one.content[name][:window] for name in ("input_ids", "labels")}}
        return [cut] if bool((cut["labels"] != IGNORED).any()) else []

    def labels(self, example: Mapping[str, Tensor]) -> int:
        return int((example["labels"] != IGNORED).sum())

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        own = [{name: e[name] for name in ("input_ids", "labels")} for e in examples]
        batch = super().collate(own, widths)
        del batch["attention_mask"]  # padding comes last, behind all that a causal model looks at
        return batch

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return next_token.inputs(batch)

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        check_ids(model, (e["input_ids"] for e in examples))

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        return next_token.loss(model, batch, smoothing=smoothing)

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        return next_token.outline(model, shape, device, counted)

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        passed = [
            sum(programs.passes(p, self.seconds) for p in some)
            for some in self._programs(model, examples, batch, between)
        ]
        parts = torch.tensor([programs.pass_at(self.k, self.samples, n) for n in passed]).double()
        nats = []
        with evaluating(model):
            for _, inputs in batches(self, model, examples, batch, between):
                nats.append(float(self.loss(model, inputs)[0]))
        total = sum(nats) / max(1, sum(map(self.labels, examples)))
        return [
            Figure.of(self.METRIC, parts, torch.ones_like(parts)),
            Figure("nats", total, "nats per token"),
        ]

    def _programs(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between = nothing
    ) -> list[list[str]]:
        """Returns the model's programs for every example, each between its prompt and its test."""
        every = [question(e) for e in examples for _ in range(self.samples)]
        drawing = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.samples > 1 else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            written = asked(
                model, self.processor, every, batch=batch, between=between, further=FURTHER, drawing=drawing
            )
        found = []
        for i, e in enumerate(examples):
            own = written[i * self.samples : (i + 1) * self.samples]
            found.append([f"{_text(e['prompt'])}{text}\n{_text(e['test'])}\n" for text in own])
        return found

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        some = examples[: 2 * WORST]
        rows = []
        for e, (program, *_) in zip(some, self._programs(model, some, batch), strict=True):
            why = programs.failure(program, self.seconds)
            truth = text_of(question(e).truth, self.processor)
            answer = f"{program[:SHOWN]}\n{why}"
            rows += [{"input": _text(e["prompt"]), "truth": truth, "answer": answer}] if why else []
        return {"asked": len(some), "right": len(some) - len(rows), "worst": rows[:WORST]}


def question(example: Mapping[str, Tensor]) -> Question:
    """Returns the tokens of the prompt and of the true program."""
    learned = example["labels"] != IGNORED
    start = int(learned.nonzero()[0]) + 1
    return Question(example["input_ids"][:start].tolist(), example["labels"][learned].tolist())


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def _text(found: Tensor) -> str:
    return bytes(found.tolist()).decode()
