"""Texts as padded rows of tokens, for encoders and for decoders that answer once per row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.task import Batch, Between, Task, batches, nothing
from veneer.tasks.text import checks

IGNORED = -100  # a label that no loss sees


class Padded(Task):
    """A task whose examples are rows of token ids: {"input_ids" (t,), ["token_type_ids" (t,)], ..}.

    Tensors of an example that are as long as its tokens are padded by `fill`; others are stacked.
    """

    PIPELINE = "text-classification"

    @property
    def pad(self) -> int:
        """Returns the token that fills the ends of short rows; the attention mask hides it."""
        own = (self.processor.pad_token_id, self.processor.eos_token_id)
        return next((int(i) for i in own if i is not None), 0)

    def fill(self, name: str) -> int:
        """Returns the number that fills the ends of short rows of a tensor."""
        return {"input_ids": self.pad, "labels": IGNORED}.get(name, 0)

    def tokenised(self, texts: Sequence[Any], most: int | None = None, **options: Any) -> dict[str, Tensor]:
        """Returns the tokens of a text or of a pair of texts, cut to at most `most`."""
        cut = {} if most is None else {"truncation": True, "max_length": most}
        found = self.processor(*texts, verbose=False, **cut, **options)
        return {name: torch.tensor(found[name]) for name in ("input_ids", "token_type_ids") if name in found}

    def size(self, example: Mapping[str, Tensor]) -> int:
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        t = self.width(examples, widths)
        batch = {name: self._stacked(name, [e[name] for e in examples], t) for name in examples[0]}
        sizes = torch.tensor([self.size(e) for e in examples])
        return {**batch, "attention_mask": (torch.arange(t) < sizes[:, None]).long()}

    def _stacked(self, name: str, values: Sequence[Tensor], t: int) -> Tensor:
        if not values[0].ndim:
            return torch.stack(list(values))
        missing = [t - len(v) for v in values]
        padded = (
            nn.functional.pad(v, (0, n), value=self.fill(name)) for v, n in zip(values, missing, strict=True)
        )
        return torch.stack(list(padded))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {k: v for k, v in batch.items() if k not in ("labels", "target")}

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        checks.check_length(model, self.reading.window)
        check_ids(model, (e["input_ids"] for e in examples))

    @torch.no_grad()
    def answers(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between = nothing
    ) -> list[Tensor]:
        """Returns `answer` of every example, in order; similar lengths share a batch."""
        order = sorted(range(len(examples)), key=lambda i: self.size(examples[i]))
        found: list[Tensor] = [torch.empty(0)] * len(examples)
        with evaluating(model):
            some = batches(self, model, [examples[i] for i in order], batch, between)
            each = (one for _, inputs in some for one in self.answer(model, inputs))
            for i, one in zip(order, each, strict=True):
                found[i] = one.float().cpu()
        return found

    def answer(self, model: nn.Module, batch: Batch) -> Iterable[Tensor]:
        """Returns the model's output for every row of a batch."""
        found: Tensor = model(**self.inputs(batch)).logits
        return found


def check_ids(model: nn.Module, every: Iterable[Tensor]) -> None:
    """Raises DataError if a token has no embedding in the model."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    largest = max((int(ids.max()) for ids in every if len(ids)), default=0)
    if largest >= table.num_embeddings:
        raise DataError(
            f"tokens must be below {table.num_embeddings}, the model's embeddings, got {largest} from the"
            " tokenizer; use the model's own tokenizer"
        )


def text_of(row: Row, column: str) -> str:
    """Returns a column as text. Raises DataError, naming the row, for anything else."""
    found = row.columns[column]
    if not isinstance(found, str):
        raise DataError(f"{row.where}: column {column!r} must be text, got {found!r}")
    return found


def check_outputs(model: nn.Module, n: int, names: str) -> None:
    """Raises ConfigError if the model's head has another number of outputs than `n`."""
    config: Any = model.config
    if config.num_labels != n:
        raise ConfigError(
            f"model: its head must have {n} outputs, one for each {names}, got {config.num_labels}"
        )
