"""Vectors of texts by a model without a head, compared by their cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.tasks.base.abilities import Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, batches
from veneer.tasks.text import checks
from veneer.tasks.text.padded import Padded, check_ids, text_of

Pooling = Literal["mean", "first", "last"]


class Vectors(Padded, Outlined):
    """Pairs of texts as {"input_ids", "other_ids", ..}; `pool` makes one vector of each text."""

    AUTO = "transformers.AutoModel"
    PIPELINE = "sentence-similarity"
    SETTINGS = ("length",)
    EXAMPLE = "pair"

    def __init__(self, processor: Any, reading: Reading, *, pooling: Pooling = "mean") -> None:
        super().__init__(processor, reading)
        self.pooling = pooling

    def pair(self, row: Row) -> dict[str, Tensor]:
        """Returns the tokens of the two texts of a row."""
        names = zip(("input_ids", "other_ids"), self.FORMS[row.kind][:2], strict=True)
        return {name: self.tokenised([text_of(row, column)])["input_ids"] for name, column in names}

    def encode(self, row: Row) -> Encoded:
        content = self.pair(row)
        return Encoded(row, content, max(map(len, content.values())))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [{name: t[:window] if t.ndim else t for name, t in one.content.items()}]

    def size(self, example: Mapping[str, Tensor]) -> int:
        return max(len(example["input_ids"]), len(example["other_ids"]))

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        t = self.width(examples, widths)
        batch = {name: self._stacked(name, [e[name] for e in examples], t) for name in examples[0]}
        for ids, mask in (("input_ids", "attention_mask"), ("other_ids", "other_mask")):
            sizes = torch.tensor([len(e[ids]) for e in examples])
            batch[mask] = (torch.arange(t) < sizes[:, None]).long()
        return batch

    def fill(self, name: str) -> int:
        return self.pad

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def unused(self, model: nn.Module) -> list[str]:
        return [n for n, m in model.named_modules() if "pooler" in n.split(".") and not [*m.children()]]

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        checks.check_length(model, self.reading.window)
        check_ids(model, (e[name] for e in examples for name in ("input_ids", "other_ids")))

    def vectors(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the vectors (b, d) of the first and of the other texts, of length 1, from one pass."""
        both = torch.cat([batch["input_ids"], batch["other_ids"]])
        mask = torch.cat([batch["attention_mask"], batch["other_mask"]])
        hidden = model(input_ids=both, attention_mask=mask)[0]
        found = nn.functional.normalize(self.pool(hidden, mask).float(), dim=-1)
        first, other = found.split(len(found) // 2)
        return first, other

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Returns one vector (b, d) for each text from its hidden states (b, t, d)."""
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
        return (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]

    @torch.no_grad()
    def all_vectors(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
    ) -> tuple[Tensor, Tensor]:
        """Returns the vectors (n, d) of all examples."""
        with evaluating(model):
            found = [self.vectors(model, b) for _, b in batches(self, model, examples, batch, between)]
        return torch.cat([f for f, _ in found]).cpu(), torch.cat([o for _, o in found]).cpu()

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        ids = torch.zeros(2 * shape.rows, shape.tokens, dtype=torch.int64, device=device)
        total: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float().sum()
        return total
