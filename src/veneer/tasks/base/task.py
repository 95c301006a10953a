"""The interface of a task: from rows to examples, batches, a loss and figures. Loops see nothing else."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from veneer.data.forms.media import Media
from veneer.data.order.streamed import Joiner
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.ops.chunked import Kernel
from veneer.tasks.base import flat
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Shape
from veneer.tasks.base.single import Single

Own = TypeVar("Own", bound="Task")
Batch = Mapping[str, Tensor]
Say = Callable[[str], None]
Between = Callable[[], None]


def nothing() -> None:
    """Does nothing, between the batches of an evaluation."""


class Objective(Protocol):
    """A loss that a training lowers."""

    def __call__(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        """Returns the sum of the losses and the number of labels. smoothing: share for all classes."""


class Task(ABC):
    """One objective. A row gives pieces, pieces join into examples, and examples are collated into batches.

    The keyword parameters of __init__(self, processor, reading, *, ..) are the task's options. Optional
    abilities are the classes of `abilities`.
    """

    AUTO: ClassVar[str]  # class that loads the model
    PROCESSOR: ClassVar[str] = "transformers.AutoTokenizer"  # class that loads the processor
    PIPELINE: ClassVar[str]  # the Hub's word for such a model
    METRIC: ClassVar[Metric]  # chooses the best step
    FORMS: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # columns of the task's own kinds of row; else text's
    MEDIA: ClassVar[Media | None] = None  # layout of a folder of pictures or clips
    SETTINGS: ClassVar[tuple[str, ...]] = ("length",)  # shared settings that the task obeys
    FACTS: ClassVar[tuple[str, ...]] = ("rows", "examples", "labels")  # shown of a text, a subset of facts()
    EXAMPLE: ClassVar[str] = "example"  # word for what a batch is made of
    EVALUATED: ClassVar[int] = 0  # examples of a text that are measured unless the run says; 0: all
    # Why a row has nothing to learn, and what to do; said where the task has no train_on.
    UNLEARNED: ClassVar[tuple[str, str]] = ("every label is masked", "give them a label")
    RATE: ClassVar[float] = 1.0  # share of the usual learning rate that a run takes unless it names one
    FIXED: ClassVar[bool] = True  # the model sees an example alike in every pass
    COMPARES: ClassVar[bool] = False  # the loss compares the examples of a batch, which stays whole
    NEW_HEAD: ClassVar[bool] = (
        False  # the model's head may be missing; it is trained whole beside the adapter
    )

    def __init__(self, processor: Any, reading: Reading) -> None:
        self.processor, self.reading = processor, reading

    def with_reading(self: Own, reading: Reading) -> Own:
        """Returns the task with other settings of reading, once they are decided."""
        found = copy.copy(self)
        found.reading = reading
        return found

    @classmethod
    def described(cls, settings: Mapping[str, Any]) -> str:
        """Returns a sentence on the parts of a text that these settings learn; "" for all of it."""
        return ""

    # -- rows and examples

    def decided(self, rows: Iterable[Row]) -> dict[str, Any]:
        """Returns options that the rows to learn decide, such as classes; a stream's rows come lazily."""
        return {}

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raises DataError if the rows to learn contradict the settings."""
        return

    def opening(self, rows: Mapping[str, Sequence[Row]]) -> list[str]:
        """Returns sentences on how rows, by part, will be read."""
        return []

    @abstractmethod
    def encode(self, row: Row) -> Encoded:
        """Returns the row as the task reads it. Raises DataError for a row that it cannot read."""

    @abstractmethod
    def pieces(self, one: Encoded, window: int) -> list[Any]:
        """Returns the pieces of a row, of a size of at most `window`; none if nothing of it is learned."""

    def remarks(self, kept: Sequence[Encoded]) -> list[str]:
        """Returns sentences on the rows of a part."""
        return []

    def join(self, pieces: Iterable[Any]) -> list[Any]:
        """Returns the examples that the pieces make, in order."""
        joiner = self.joiner()
        closed = [example for piece in pieces if (example := joiner.add(piece)) is not None]
        return [*closed, *joiner.open]

    def joiner(self, still_open: Iterable[Any] = ()) -> Joiner:
        """Returns what joins pieces one at a time, with these unfinished examples."""
        return Single()

    def evaluated(self, kept: Sequence[Encoded], at_most: int) -> list[Any]:
        """Returns the examples of a text to measure: at most that many, evenly spaced; all of them for 0."""
        return spread(self.join(p for one in kept for p in self.pieces(one, self.reading.window)), at_most)

    def filled(self, pieces: Sequence[Any]) -> float:
        """Returns about how many examples the pieces make."""
        return len(pieces)

    def as_tensors(self, examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns examples as tensors by name: the values of each key end to end, and their shapes."""
        return flat.as_tensors(examples)

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> list[Any]:
        """Returns the examples of `as_tensors`; other names may be among them."""
        return flat.from_tensors(tensors)

    def facts(self, rows: Sequence[Row], pieces: Sequence[Any], examples: Sequence[Any]) -> dict[str, Any]:
        """Returns counts of a text and a hash of its content; a resumed run must find the same."""
        digest = hashlib.sha256()
        for name, t in sorted(self.as_tensors(pieces).items()):
            digest.update(name.encode() + t.numpy().tobytes())
        counts = {"size": sum(map(self.size, examples)), "labels": sum(map(self.labels, examples))}
        return {"rows": len(rows), "examples": len(examples), **counts, "sha256": digest.hexdigest()}

    def companion(self, facts: Mapping[str, Any]) -> Any:
        """Returns the processor to save beside the adapter, or None for the base's own. facts: of train."""
        return None

    # -- batches

    def rendering(self, facts: Mapping[str, Any]) -> str:
        """Returns a sentence on the form that rows with these facts were written in; "" for their own."""
        return ""

    @abstractmethod
    def size(self, example: Any) -> int:
        """Returns the size of an example, such as its tokens; similar sizes share a batch."""

    def labels(self, example: Any) -> int:
        """Returns how many labels an example has; losses are means over labels."""
        return 1

    def width(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> int:
        """Returns the size of each row of a batch: the largest, or the smallest of `widths` that holds it."""
        longest = max(map(self.size, examples))
        return min((w for w in widths if w >= longest), default=longest)

    @abstractmethod
    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        """Returns a batch of the examples; its rows are width(examples, widths) wide."""

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the model's forward: a batch without its labels."""
        return {k: v for k, v in batch.items() if k != "labels"}

    def shape(self, examples: Sequence[Any], rows: int, passes: int) -> Shape:
        """Returns the largest batch that a training on these examples may meet."""
        tokens = max(map(self.size, examples))
        labels = math.ceil(rows * sum(map(self.labels, examples)) / len(examples))
        return Shape(rows, tokens, labels, passes)

    def trial(self, examples: Sequence[Any]) -> Any:
        """Returns a small example for dry runs."""
        return examples[0]

    # -- model

    @classmethod
    def head_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments that give a loaded model this task's head, such as num_labels."""
        return {}

    def model_options(self) -> dict[str, Any]:
        """Returns further arguments of the class that loads the model, such as id2label."""
        return {}

    def unused(self, model: nn.Module) -> list[str]:
        """Returns modules whose outputs the task does not use; they are not trained."""
        return []

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        """Raises ConfigError or DataError if the base and the examples do not fit together."""
        return

    def check_adapted(self, model: nn.Module, examples: Sequence[Any]) -> None:
        """Raises ConfigError if the adapted model computes the examples in a wrong way."""
        return

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        """Returns the sum of the losses of a batch, and the number of labels."""

    def objective(self, kernel: Kernel) -> Objective:
        """Returns the loss with a compiled kernel, where the task has a use for one."""
        return self.loss

    def body(self, model: nn.Module) -> nn.Module:
        """Returns the part of the model whose blocks are compiled."""
        return model

    @abstractmethod
    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        """Returns figures of the model on the examples, METRIC first, measured in evaluation mode.

        each: with the parts and weights of every example. between: called before every batch; its errors end
        the evaluation. Raises DataError if there is nothing to measure.
        """


def batches(
    task: Task, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
) -> Iterable[tuple[Sequence[Any], dict[str, Tensor]]]:
    """Yields the examples of each batch and the batch itself, on the model's device."""
    device = next(model.parameters()).device
    for at in range(0, len(examples), batch):
        between()
        some = examples[at : at + batch]
        yield some, {k: v.to(device) for k, v in task.collate(some).items()}
