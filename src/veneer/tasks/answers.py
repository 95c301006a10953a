"""Answers to prompts, learned as language modelling and measured by the answers that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from veneer import foreign
from veneer.data.pack import Window
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.errors import DataError, option
from veneer.tasks.base.abilities import Examined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Between, nothing
from veneer.tasks.causal_lm import CausalLM
from veneer.tasks.text.answering import MATCHES, Question, asked, questions, short_answers, text_of

SHOWN = 600  # characters of a prompt in the report, its end


class Answers(CausalLM, Examined):
    """Prompts and conversations, measured by greedy answers; bits per byte stands beside them.

    The last answer of a conversation is asked for, behind all that comes before it.

    match: exact: the same text but for outer white space; json: equal as JSON
    """

    METRIC: ClassVar[Metric] = Metric("right", "share of right answers", lower_is_better=False)
    SETTINGS = tuple(name for name in CausalLM.SETTINGS if name != "train_on")
    EVALUATED = 200

    def __init__(
        self, processor: Any, reading: Reading, *, match: Literal["exact", "json"] = "exact"
    ) -> None:
        super().__init__(processor, reading)
        self.match = match

    def encode(self, row: Row) -> Encoded:
        if row.kind == "text":
            raise DataError(
                f"{row.where}: must be a prompt with its completion, or a conversation, got plain text"
            )
        one = super().encode(row)
        if self.match == "json":
            self._check_json(row)
        return one

    def _check_json(self, row: Row) -> None:
        truth = (
            row.columns["completion"] if row.kind == "pair" else row.columns["messages"][-1].get("content")
        )
        try:
            foreign.loads(truth)
        except (TypeError, ValueError) as e:
            exact = option("answers-match", "exact")
            raise DataError(
                f"{row.where}: the answer must be JSON ({e}); correct it, or use {exact}"
            ) from None

    def evaluated(self, kept: Sequence[Encoded], at_most: int) -> list[Window]:
        # Every row asks one question: rows are counted, not windows of several.
        return super().evaluated(spread(kept, at_most), 0)

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Window],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        every = [questions([window]) for window in examples]
        right = iter(self._right(model, [q for some in every for q in some], batch, between))
        parts = torch.tensor([float(sum(next(right) for _ in some)) for some in every], dtype=torch.float64)
        weights = torch.tensor([float(len(some)) for some in every], dtype=torch.float64)
        if not float(weights.sum()):
            raise DataError("the evaluated text has no prompt with an answer behind it")
        bits = super().measure(model, examples, batch=batch, each=each, between=between)
        return [Figure.of(self.METRIC, parts, weights), *bits]

    def _right(self, model: nn.Module, every: Sequence[Question], batch: int, between: Between) -> list[bool]:
        answers = asked(model, self.processor, every, batch=batch, between=between)
        return [
            MATCHES[self.match](answer, text_of(q.truth, self.processor))
            for answer, q in zip(answers, every, strict=True)
        ]

    def answers(self, model: nn.Module, examples: Sequence[Window], *, batch: int) -> list[dict[str, Any]]:
        return short_answers(model, self.processor, examples, batch=batch, right=MATCHES[self.match])

    def examined(self, model: nn.Module, examples: Sequence[Window], *, batch: int) -> dict[str, Any]:
        every = questions(examples)[:MOST]
        answers = asked(model, self.processor, every, batch=batch)
        wrong = [
            {"input": text_of(q.prompt, self.processor)[-SHOWN:], "truth": truth, "answer": answer}
            for answer, q in zip(answers, every, strict=True)
            if not MATCHES[self.match](answer, truth := text_of(q.truth, self.processor))
        ]
        return {"right": len(every) - len(wrong), "asked": len(every), "worst": wrong[:WORST]}


MOST, WORST = 48, 12  # questions asked for the report, and wrong answers shown
