"""Optional abilities of a task; the code that needs one asks with isinstance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Task


class Joint(ABC):
    """A task whose trainings can share one pass through the base."""

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch, rows: Sequence[int], smoothing: Sequence[float]
    ) -> list[Tensor]:
        """Returns the sums of the losses of the first rows[0] rows, of the next rows[1], and so on."""


class Outlined(ABC):
    """A task whose step can be simulated by shapes alone, so that its memory is known beforehand."""

    @abstractmethod
    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        """Returns the loss of a batch of this shape, without a look at any number of a tensor.

        counted(times): a context whose operations count so many times.
        """

    def outputs(self, model: nn.Module, shape: Shape) -> int:
        """Returns how many numbers of the model's output are held at a time, as logits."""
        return 0


class Draws(ABC):
    """A task whose loss draws random numbers for its examples, such as noise or hidden tokens."""

    @abstractmethod
    def drawn(self, examples: Sequence[Any]) -> list[Any]:
        """Returns the examples with these numbers, drawn as the loss draws them for one batch."""


class Decoder(ABC):
    """A task whose model reads tokens from left to right, several documents in a row; its attention can be
    faster."""

    @abstractmethod
    def tokens(self, batch: Batch) -> Tensor:
        """Returns the token ids (b, t)."""


class Writer(ABC):
    """A task whose model writes text."""

    @abstractmethod
    def prompts(self, model: nn.Module, examples: Sequence[Any], n: int = 2) -> list[dict[str, str]]:
        """Returns n prompts from held-out examples, each as {prompt, truth}."""

    @abstractmethod
    def write(self, model: nn.Module, prompt: str, *, seed: int) -> str:
        """Returns the model's continuation of the prompt.

        Raises ConfigError if the prompt fills the context.
        """

    @abstractmethod
    def writing(self, model: nn.Module) -> Mapping[str, Any]:
        """Returns the settings of `write`, for the record."""


class Previewed(ABC):
    """A task whose examples can be shown token by token."""

    @abstractmethod
    def preview(self, examples: Sequence[Any]) -> list[list[list[Any]]]:
        """Returns the beginnings of a few rows, each a list of [text of a token, is it learned]."""


class Examined(ABC):
    """A task whose answers can be looked at one by one in the report."""

    @abstractmethod
    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        """Returns {"confusion": {"names": [..], "counts": [[..]]}, "worst": [..]}, each of them optional.

        counts[i][j]: examples of class i answered as class j. worst: examples with the largest losses first,
        each {"input": text, "truth": .., "answer": .., "loss": ..}; an input may also be
        {"image": data URI} or {"audio": data URI}, as may an answer.
        """


class Asked(ABC):
    """A task whose examples may hold questions with short answers, right or wrong."""

    @abstractmethod
    def answers(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> list[dict[str, Any]]:
        """Returns {prompt, truth, answer, right} of some examples; nothing if most answers are long texts."""


class Surveyed(Task):
    """A task whose rows can be counted, checked and shown without a model."""

    @abstractmethod
    def figures(self, every: Sequence[Encoded]) -> dict[str, Any]:
        """Returns counts of the rows of a part, with rows, lengths, duplicates and learned tokens."""

    @abstractmethod
    def problems(self, every: Sequence[Encoded]) -> dict[str, list[str]]:
        """Returns the names of rows by their problem, as {"endless": [..]}; a list may be empty."""

    @abstractmethod
    def problem(self, problem: str, rows: Sequence[str]) -> str:
        """Returns the sentence on the rows with a problem."""

    @abstractmethod
    def epoch(self, examples: Sequence[Any], per_step: int) -> dict[str, Any]:
        """Returns counts of one pass over the examples; per_step: examples of a training step."""

    @abstractmethod
    def entries(self, one: Encoded) -> list[dict[str, Any]]:
        """Returns the row's examples token by token."""


def surveyed(task: Task, name: str) -> Surveyed:
    """Returns the task if it has this ability. Raises ConfigError."""
    if not isinstance(task, Surveyed):
        raise ConfigError(f"data of task {name!r} cannot be shown or checked without a training")
    return task
