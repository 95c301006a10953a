"""A text as examples, each with the unit (document or example) whose figure it is part of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.row_files import Row
from veneer.errors import DataError
from veneer.ops import bootstrap
from veneer.runs.texts.texts import by_row
from veneer.tasks import Figure, Task
from veneer.train.loop.progress import Notes
from veneer.verbs.eval.lines import Line, line


class MeasuredText(NamedTuple):
    """A text to measure. owner (examples,): the unit of each; units: their name."""

    name: str
    task: Task
    examples: list[Any]
    owner: Tensor
    units: str

    @classmethod
    def of(cls, name: str, rows: Sequence[Row], task: Task, model: nn.Module, notes: Notes) -> MeasuredText:
        """Returns the text of these rows. Raises one DataError for all rows that cannot be measured."""
        whole = [task.join(pieces) for pieces in by_row(rows, task, notes, name)]
        examples = [e for some in whole for e in some]
        task.check(model, examples)
        if len(whole) >= bootstrap.FEWEST or len(examples) == len(whole):
            owner = torch.tensor([i for i, some in enumerate(whole) for _ in some])
            return cls(name, task, examples, owner, "documents")
        notes.say(
            f"{name}: {len(whole)} documents are too few for an interval; it is over their {task.EXAMPLE}s,"
            " which are"
            " less independent"
        )
        return cls(name, task, examples, torch.arange(len(examples)), f"{task.EXAMPLE}s")

    def measure(self, model: nn.Module, batch: int) -> list[Figure]:
        """Returns the figures of the model in its present state, their parts by unit."""
        return [self._by_unit(f) for f in self.task.measure(model, self.examples, batch=batch, each=True)]

    def _by_unit(self, figure: Figure) -> Figure:
        if figure.parts is None or figure.weights is None:
            return figure
        n = int(self.owner.max()) + 1
        parts, weights = (_summed(x, self.owner, n) for x in (figure.parts, figure.weights))
        if not float(weights.sum()):
            raise DataError(f"{self.name}: the text holds no measured byte")
        return Figure.of(figure.metric, parts, weights)

    def lines(self, found: Mapping[str, Sequence[Figure]], seed: int) -> list[Line]:
        """Returns a line for every figure, from those of each model by title."""
        n = int(self.owner.max()) + 1
        each = zip(*found.values(), strict=True)
        return [line(self.name, self.units, n, dict(zip(found, some, strict=True)), seed) for some in each]


def _summed(x: Tensor, owner: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64).index_add_(0, owner, x.double())
