"""Classification of words: the cross-entropy of one class per word, such as names of people in a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Examined, Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, nothing
from veneer.tasks.measures import spans
from veneer.tasks.text import classes
from veneer.tasks.text.classified import Classified
from veneer.tasks.text.padded import IGNORED, Padded, check_outputs

NAME = "token-classification"
WORST = 12  # examples shown in the report


class TokenClassification(Classified, Padded, Outlined, Examined):
    """One class per word, measured by the F1 of whole spans (B-, I-, O) or, for other classes, of words.

    The first token of a word carries its class; the others carry none.

    labels: names of the classes in the order of the model's outputs; those of the rows to learn unless given
    """

    AUTO = "transformers.AutoModelForTokenClassification"
    PIPELINE = "token-classification"
    METRIC = Metric("f1", "F1", lower_is_better=False)
    FORMS = {"tagged": ("tokens", "tags"), "named": ("tokens", "ner_tags"), "labelled": ("words", "labels")}
    SETTINGS = ("length", "label_smoothing")
    NEW_HEAD = True

    def __init__(self, processor: Any, reading: Reading, *, labels: tuple[str, ...] = ()) -> None:
        super().__init__(processor, reading)
        if not getattr(processor, "is_fast", False):
            raise ConfigError(f"task {NAME!r} needs a fast tokenizer, which knows the word of every token")
        self.classes = tuple(labels)

    def decided(self, rows: Iterable[Row]) -> dict[str, Any]:
        every = [Row(row.kind, {"label": tag}, row.where) for row in rows for tag in self.words(row)[1]]
        return {"labels": self.classes or classes.decided(every)}

    def words(self, row: Row) -> tuple[list[str], list[Any]]:
        """Returns the words of a row and their classes. Raises DataError if they do not match."""
        words, tags = (row.columns[name] for name in self.FORMS[row.kind])
        if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
            raise DataError(
                f"{row.where}: column {self.FORMS[row.kind][0]!r} must be a list of words, got {words!r}"
            )
        if not isinstance(tags, list) or len(tags) != len(words):
            n = len(tags) if isinstance(tags, list) else tags
            raise DataError(f"{row.where}: there must be one class for each of {len(words)} words, got {n!r}")
        return words, tags

    def encode(self, row: Row) -> Encoded:
        words, tags = self.words(row)
        found = self.processor(words, is_split_into_words=True, verbose=False)
        of_word = [classes.index(tag, self.classes, row, NAME) for tag in tags]
        labels, before = [], None
        for word in found.word_ids():
            labels.append(IGNORED if word is None or word == before else of_word[word])
            before = word
        content = {"input_ids": torch.tensor(found["input_ids"]), "labels": torch.tensor(labels)}
        return Encoded(row, content, len(labels))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        cut = {name: t[:window] for name, t in one.content.items()}
        return [cut] if bool((cut["labels"] != IGNORED).any()) else []

    def labels(self, example: Mapping[str, Tensor]) -> int:
        return int((example["labels"] != IGNORED).sum())

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        super().check(model, examples)
        check_outputs(model, len(self.classes), "class")

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        learned = batch["labels"] != IGNORED
        logits = model(**self.inputs(batch)).logits[learned].float()
        total = F.cross_entropy(logits, batch["labels"][learned], reduction="sum", label_smoothing=smoothing)
        return total, len(logits)

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
        total: Tensor = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().sum()
        )
        return total

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        pairs = self._pairs(self.answers(model, examples, batch, between), examples)
        return [Figure(self.METRIC.name, spans.f1(pairs, self.classes), "F1", False), spans.accuracy(pairs)]

    def _pairs(self, answers: Sequence[Tensor], examples: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
        """Returns the true and the given classes of the words of every example."""
        found = []
        for logits, e in zip(answers, examples, strict=True):
            learned = e["labels"] != IGNORED
            chosen = logits[: len(learned)][learned].argmax(-1)
            found.append((e["labels"][learned].tolist(), chosen.tolist()))
        return found

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        pairs = self._pairs(self.answers(model, examples, batch), examples)
        truths, chosen = ([i for pair in pairs for i in pair[side]] for side in (0, 1))
        wrong = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -wrong[i])[:WORST]
        return {
            "confusion": classes.confusion(truths, chosen, self.classes),
            "worst": [self._shown(examples[i], pairs[i], wrong[i]) for i in order if wrong[i]],
        }

    def _shown(self, example: Mapping[str, Tensor], pair: tuple[list[int], list[int]], wrong: int) -> Any:
        text = self.processor.decode(example["input_ids"], skip_special_tokens=True)
        truth, answer = (" ".join(self.classes[i] for i in side) for side in pair)
        return {"input": text, "truth": truth, "answer": answer, "loss": float(wrong)}
