"""One answer for a text or for a pair of texts: rows of GLUE, and the model's head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.data.row_files import Row
from veneer.tasks.base.abilities import Examined, Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch
from veneer.tasks.text.padded import Padded, text_of

# Columns of the texts, those of GLUE's tasks included: https://gluebenchmark.com
TEXTS: Mapping[str, tuple[str, ...]] = {
    "labelled": ("text",),
    "labelled-pair": ("text_a", "text_b"),
    "sentence": ("sentence",),
    "sentences": ("sentence1", "sentence2"),
    "questions": ("question1", "question2"),
    "answered": ("question", "sentence"),
    "entailed": ("premise", "hypothesis"),
}
WORST = 12  # examples shown in the report


class Sequences(Padded, Outlined, Examined):
    """A task with one answer per row, from a head that is trained whole beside the adapter."""

    AUTO = "transformers.AutoModelForSequenceClassification"
    FORMS = {kind: (*texts, "label") for kind, texts in TEXTS.items()}
    NEW_HEAD = True

    @abstractmethod
    def target(self, row: Row) -> Tensor:
        """Returns the answer of a row as a tensor without dimensions. Raises DataError."""

    @abstractmethod
    def errors(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        """Returns the loss of every row (b,) for logits (b, n) in float32."""

    def encode(self, row: Row) -> Encoded:
        texts = [text_of(row, column) for column in TEXTS[row.kind]]
        tokens = self.tokenised(texts)
        content = {**tokens, "target": self.target(row)}
        return Encoded(row, content, len(tokens["input_ids"]))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        if len(one.content["input_ids"]) <= window:
            return [one.content]
        texts = [text_of(one.row, column) for column in TEXTS[one.row.kind]]
        return [{**one.content, **self.tokenised(texts, window)}]

    def model_options(self) -> dict[str, Any]:
        return {"pad_token_id": self.pad}

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        found = self.errors(self.logits(model, batch), batch["target"], smoothing)
        return found.sum(), len(found)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the head's outputs (b, n) in float32."""
        found: Tensor = model(**self.inputs(batch)).logits
        return found.float()

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        total: Tensor = logits.square().sum()
        return total

    def shown(self, example: Mapping[str, Tensor]) -> str:
        """Returns the text of an example, for people."""
        return str(self.processor.decode(example["input_ids"], skip_special_tokens=True))

    def worst(
        self, model: nn.Module, examples: Sequence[Any], answers: Sequence[Tensor]
    ) -> list[dict[str, Any]]:
        """Returns the examples with the largest losses, for the report."""
        stacked = torch.stack(list(answers))
        losses = self.errors(stacked, torch.stack([e["target"] for e in examples]), 0.0)
        found = []
        for i in losses.argsort(descending=True)[:WORST].tolist():
            words = (self.words(examples[i]["target"]), self.words(self.decide(answers[i])))
            own = {"input": self.shown(examples[i]), "truth": words[0], "answer": words[1]}
            found.append({**own, "loss": float(losses[i])})
        return found

    @abstractmethod
    def decide(self, logits: Tensor) -> Tensor:
        """Returns the answer for one row of logits (n,)."""

    @abstractmethod
    def words(self, target: Tensor) -> str:
        """Returns an answer in words."""
