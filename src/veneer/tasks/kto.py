"""KTO: single answers, each good or bad, are moved away from a point of reference z.

Good: l_D (1 - sigmoid(beta (gain - z))); bad: l_U (1 - sigmoid(beta (z - gain))), where gain is
log pi(y|x) - log r(y|x) and z = max(0, mean gain of answers behind other rows' prompts), without a gradient.
Ethayarajh et al. 2024, equations 7 and 8, https://arxiv.org/abs/2402.01306
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.pack import IGNORED
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import DataError
from veneer.ops.chunked import Kernel
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, batches
from veneer.tasks.preference import answers, columns
from veneer.tasks.preference.base import LOSS, Preference
from veneer.tasks.preference.options import check_above
from veneer.tasks.preference.scores import compared, scores

ACCURACY = Metric("accuracy", "share of answers with a reward of the right sign", False)
CHOSEN = Metric("chosen", "reward of good answers", False)
REJECTED = Metric("rejected", "reward of bad answers")
KL = Metric("kl", "nats of KL(model, base) per token of the answers")
BALANCE = (1.0, 4 / 3)  # good weight over bad weight; the paper's section 4.2
TRUE, FALSE = (True, 1, "1", "true", "True"), (False, 0, "0", "false", "False")


class KTO(Preference):
    """Single answers with a label, true for a good one. Pairs of answers give one good and one bad answer.

    Batches need several rows: the answers of a batch, behind each other's prompts, give z.

    beta: strength of the tie to the base
    desirable: weight of good answers
    undesirable: weight of bad answers
    """

    FORMS = {**columns.PAIRS, **columns.JUDGED, **columns.TEXT}
    EXAMPLE = "answer"
    COMPARES = True  # z is of the whole batch
    ANSWERS = ("answer",)

    def __init__(
        self,
        processor: Any,
        reading: Reading,
        *,
        beta: float = 0.1,
        desirable: float = 1.0,
        undesirable: float = 1.0,
    ) -> None:
        super().__init__(processor, reading)
        check_above(beta=beta, desirable=desirable, undesirable=undesirable)
        self.beta, self.weights = beta, (undesirable, desirable)

    def sides(self, row: Row) -> list[Row]:
        if row.kind in columns.PAIRS:
            both = columns.answered(row, *self.FORMS[row.kind][-2:])
            return [] if any(map(columns.is_empty, both)) or both[0].columns == both[1].columns else both
        _label(row)
        one = columns.judged(row)
        return [] if columns.is_empty(one) else [one]

    def opening(self, rows: Mapping[str, Sequence[Row]]) -> list[str]:
        found = super().opening(rows)
        good = [_label(row) for row in rows.get("train", ()) if row.kind in columns.JUDGED]
        if not good:
            return found
        if len({*good}) == 1:
            raise DataError(f"label must be true in some rows and false in others, got {good[0]} in all")
        n = sum(good)
        ratio = self.weights[1] * n / (self.weights[0] * (len(good) - n))
        if BALANCE[0] <= ratio <= BALANCE[1]:
            return found
        return [
            *found,
            f"{n} of {len(good)} answers are good: together they weigh {ratio:.2f} times as much as the bad"
            " ones; weights desirable and undesirable that bring it between 1 and 1.33 are the paper's",
        ]

    def judged(self, row: Row, own: answers.Asked) -> list[dict[str, Tensor]]:
        labels = (True, False) if len(own.answers) == 2 else (_label(row),)
        every = zip(own.answers, labels, strict=True)
        return [
            {"prompt": own.prompt, "answer": a.ids, "answer_labels": a.labels, "good": torch.tensor(good)}
            for a, good in every
            if bool((a.labels != IGNORED).any())
        ]

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        batch = super().collate(examples, widths)
        if "input_ids" in examples[0]:
            return batch
        batch["good"] = torch.stack([e["good"] for e in examples])
        if len(examples) < 2:
            return batch
        # Each prompt with the next answer to another prompt, cut to the batch's width.
        every = zip(examples, _partners(examples), strict=True)
        mixed = [self._other(e, o, batch["input_ids"].shape[1]) for e, o in every]
        other = answers.stacked(mixed, batch["input_ids"].shape[1], self.pad)
        return {**batch, "other_ids": other["input_ids"], "other_labels": other["labels"]}

    def _other(self, one: Mapping[str, Tensor], other: Mapping[str, Tensor], width: int) -> Any:
        whole = answers.Asked(one["prompt"], (answers.Answer(other["answer"], other["answer_labels"]),))
        found = whole.cut(width)
        return answers.sequence(found.prompt, *found.answers[0])

    def loss(
        self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, kernel: Kernel | None = None
    ) -> tuple[Tensor, int]:
        with torch.no_grad():
            z = self._z(model, batch, kernel)
        gained = scores(model, batch, reference=True, kernel=kernel).gained
        own = self.losses(gained, batch["good"], z)
        return own.sum(), len(own)

    def _z(self, model: nn.Module, batch: Batch, kernel: Kernel | None = None) -> Tensor | float:
        """Returns the mean gain of answers behind other prompts, at least 0; 0 for a single row."""
        if "other_ids" not in batch:
            return 0.0
        other = {"input_ids": batch["other_ids"], "labels": batch["other_labels"]}
        return scores(model, other, reference=True, kernel=kernel).gained.mean().clamp(min=0)

    def losses(self, gained: Tensor, good: Tensor, z: Tensor | float) -> Tensor:
        """Returns the loss of every answer (b,)."""
        bad_weight, good_weight = self.weights
        away = self.beta * (gained - z)
        return torch.where(good, good_weight * torch.sigmoid(-away), bad_weight * torch.sigmoid(away))

    @torch.no_grad()
    def judgements(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
    ) -> list[Figure]:
        found, good = [], torch.stack([e["good"] for e in examples])
        with evaluating(model):
            for _, some in batches(self, model, examples, batch, between):
                seen = compared(model, some)
                gained = seen.scores.gained
                own = self.losses(gained, some["good"], self._z(model, some))
                found.append(torch.stack([own.double(), gained, seen.divergence, seen.scores.tokens]).cpu())
        loss, gained, divergence, tokens = torch.cat(found, 1)
        reward, one = self.beta * gained, torch.ones_like(loss)
        sign = torch.where(good, reward, -reward).sign()
        figures = [Figure.of(LOSS, loss, one), Figure.of(ACCURACY, (1 + sign) / 2, one)]
        for metric, own in ((CHOSEN, good), (REJECTED, ~good)):
            if bool(own.any()):
                figures.append(Figure.of(metric, reward * own, own.double()))
        return [*figures, Figure.of(KL, divergence, tokens)]


def _partners(examples: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Returns for every example the next one, around the end, with another prompt; else the next one."""
    n, found = len(examples), []
    for i, one in enumerate(examples):
        following = [examples[(i + k) % n] for k in range(1, n)]
        found.append(
            next((e for e in following if not torch.equal(e["prompt"], one["prompt"])), following[0])
        )
    return found


def _label(row: Row) -> bool:
    """Returns the judgement of a row. Raises DataError for anything but true and false."""
    given = row.columns["label"]
    for value, known in ((True, TRUE), (False, FALSE)):
        if not isinstance(given, float) and given in known:
            return value
    raise DataError(f"{row.where}: label must be true or false, got {given!r}")
