"""Classification of texts and of pairs of texts: the cross-entropy of one class per row, as in GLUE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.tasks.base.figure import Figure
from veneer.tasks.base.task import Between, nothing
from veneer.tasks.measures.scores import ACCURACY, check_packages, of_classes
from veneer.tasks.text import classes
from veneer.tasks.text.classified import Classified
from veneer.tasks.text.padded import check_outputs
from veneer.tasks.text.sequences import Sequences

NAME = "sequence-classification"


class SequenceClassification(Classified, Sequences):
    """One class per row, measured by accuracy; F1 and Matthews correlation stand beside it.

    labels: names of the classes in the order of the model's outputs; those of the rows to learn unless given
    """

    METRIC = ACCURACY
    SETTINGS = ("length", "label_smoothing")

    def __init__(self, processor: Any, reading: Reading, *, labels: tuple[str, ...] = ()) -> None:
        check_packages(NAME, {"sklearn": "scikit-learn"})
        super().__init__(processor, reading)
        self.classes = tuple(labels)

    def target(self, row: Row) -> Tensor:
        return torch.tensor(classes.index(row.columns["label"], self.classes, row, NAME))

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        super().check(model, examples)
        check_outputs(model, len(self.classes), "class")

    def errors(self, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    def decide(self, logits: Tensor) -> Tensor:
        return logits.argmax()

    def words(self, target: Tensor) -> str:
        return self.classes[int(target)]

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        chosen = [int(self.decide(a)) for a in self.answers(model, examples, batch, between)]
        return of_classes([int(e["target"]) for e in examples], chosen, len(self.classes))

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        answers = self.answers(model, examples, batch)
        truths = (int(e["target"]) for e in examples)
        chosen = (int(self.decide(a)) for a in answers)
        return {
            "confusion": classes.confusion(truths, chosen, self.classes),
            "worst": self.worst(model, examples, answers),
        }
