"""Classification of pictures: the cross-entropy of one class per picture, for transformers and conv nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.forms.media import PICTURES, Media
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Examined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, batches, nothing
from veneer.tasks.measures.scores import ACCURACY
from veneer.tasks.senses import pictures
from veneer.tasks.text import classes
from veneer.tasks.text.classified import Classified

NAME, WORST = "image-classification", 12


class ImageClassification(Classified, Examined):
    """One class per picture, measured by accuracy. The head is trained whole beside the adapter.

    labels: names of the classes in the order of the model's outputs; those of the rows to learn unless given
    """

    AUTO = "transformers.AutoModelForImageClassification"
    PROCESSOR = "transformers.AutoImageProcessor"
    PIPELINE = "image-classification"
    METRIC: ClassVar[Metric] = ACCURACY
    FORMS = {"image": ("image", "label"), "file": ("file_name", "label")}
    MEDIA = Media("image", "label", PICTURES)
    SETTINGS = ("label_smoothing",)
    EXAMPLE = "picture"
    NEW_HEAD = True

    def __init__(self, processor: Any, reading: Reading, *, labels: tuple[str, ...] = ()) -> None:
        super().__init__(processor, reading)
        pictures.check_processor(processor, NAME)
        self.classes = tuple(labels)

    def encode(self, row: Row) -> Encoded:
        target = classes.index(row.columns["label"], self.classes, row, NAME)
        column = "image" if "image" in row.columns else "file_name"
        x = pictures.pixels(self.processor, pictures.read(row, column))
        return Encoded(row, {"pixels": x, "target": torch.tensor(target)})

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [one.content]

    def size(self, example: dict[str, Tensor]) -> int:
        return 1

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        x = torch.stack([e["pixels"] for e in examples])
        return {"pixel_values": x, "labels": torch.stack([e["target"] for e in examples])}

    def check_rows(self, rows: Sequence[Row]) -> None:
        if len(self.classes) < 2:
            raise DataError(f"labels must have two classes or more, got {len(self.classes)}")

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        config: Any = model.config
        if config.num_labels != len(self.classes):
            raise ConfigError(
                f"labels must name the model's {config.num_labels} classes, got {len(self.classes)}"
            )
        shapes = {tuple(e["pixels"].shape) for e in examples}
        if len(shapes) > 1:
            raise DataError(f"pictures must have one size once prepared, got {sorted(shapes)[:3]}; crop them")

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the head's outputs (b, n) in float32."""
        like = next(p for p in model.parameters() if p.is_floating_point()).dtype
        found: Tensor = model(pixel_values=batch["pixel_values"].to(like)).logits
        return found.float()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"pixel_values": batch["pixel_values"]}

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        labels = batch["labels"]
        logits = self.logits(model, batch)
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), len(labels)

    @torch.no_grad()
    def answers(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between = nothing
    ) -> Tensor:
        """Returns the logits (n, classes) of all examples. Raises DataError for none."""
        if not examples:
            raise DataError("the pictures to measure must be one or more, got 0")
        with evaluating(model):
            found = [self.logits(model, b).cpu() for _, b in batches(self, model, examples, batch, between)]
        return torch.cat(found)

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        logits = self.answers(model, examples, batch, between)
        right = (logits.argmax(1) == torch.stack([e["target"] for e in examples])).double()
        return [Figure.of(self.METRIC, right, torch.ones_like(right))]

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        logits = self.answers(model, examples, batch)
        truths = torch.stack([e["target"] for e in examples])
        losses = F.cross_entropy(logits, truths, reduction="none")
        chosen = logits.argmax(1)
        worst = [
            {
                "input": {"image": pictures.as_uri(examples[i]["pixels"], self.processor)},
                "truth": self.classes[int(truths[i])],
                "answer": self.classes[int(chosen[i])],
                "loss": float(losses[i]),
            }
            for i in losses.argsort(descending=True)[:WORST].tolist()
        ]
        return {
            "confusion": classes.confusion(truths.tolist(), chosen.tolist(), self.classes),
            "worst": worst,
        }
