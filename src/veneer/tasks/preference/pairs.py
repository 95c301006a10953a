"""Pairs of answers to one prompt, a chosen and a rejected one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.pack import IGNORED, Segment
from veneer.data.row_files import Row
from veneer.ops.chunked import Kernel
from veneer.tasks.base.abilities import Examined, Previewed, Writer
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, batches, nothing
from veneer.tasks.preference import columns
from veneer.tasks.preference.answers import Asked
from veneer.tasks.preference.base import LOSS, TEXT, Preference
from veneer.tasks.preference.scores import Compared, Scores, compared, scores
from veneer.tasks.text.preview import preview
from veneer.tasks.text.samples import SAMPLES, continuation, prompts, written

ACCURACY = Metric("accuracy", "share of pairs with the larger reward on the chosen answer", False)
MARGIN = Metric("margin", "reward of the chosen answer above the rejected one", False)
CHOSEN = Metric("chosen", "reward of the chosen answer", False)
REJECTED = Metric("rejected", "reward of the rejected answer")
KL = Metric("kl", "nats of KL(model, base) per token of the answers")
NATS = Metric("nats", "nats per token of the chosen answers")
TEMPERATURE, WORST = 0.7, 12  # of samples; pairs in the report
LOPSIDED = 1.25  # ratio of mean lengths from which a training warns


class Pairs(Preference, Previewed, Writer, Examined):
    """A task on pairs: `losses` and `rewards` state the objective."""

    FORMS = {**columns.PAIRS, **columns.TEXT}
    EXAMPLE = "pair"
    ANSWERS = columns.PAIRED

    @abstractmethod
    def losses(self, found: Scores, smoothing: float) -> Tensor:
        """Returns the loss of every pair (b,). found: of the b chosen answers, then of the rejected ones."""

    @abstractmethod
    def rewards(self, found: Scores) -> Tensor:
        """Returns the implicit reward of every answer (2b,)."""

    def sides(self, row: Row) -> list[Row]:
        both = columns.answered(row, *self.FORMS[row.kind][-2:])
        equal = both[0].columns == both[1].columns
        return [] if equal or any(map(columns.is_empty, both)) else both

    def judged(self, row: Row, own: Asked) -> list[dict[str, Tensor]]:
        found = {"prompt": own.prompt}
        for name, answer in zip(self.ANSWERS, own.answers, strict=True):
            found |= {name: answer.ids, f"{name}_labels": answer.labels}
            if not bool((answer.labels != IGNORED).any()):
                return []
        # Answers that differ beyond the cut only have nothing to tell apart.
        return [] if torch.equal(found["chosen"], found["rejected"]) else [found]

    def remarks(self, kept: Sequence[Encoded]) -> list[str]:
        every = [one.content.answers for one in kept if one.row.kind != TEXT and one.content is not None]
        if not every:
            return []
        means = [sum(len(some[i].ids) for some in every) / len(every) for i in range(2)]
        if max(means) < LOPSIDED * min(means):
            return []
        said = f"chosen answers have {means[0]:.0f} tokens on average, rejected ones {means[1]:.0f}"
        return [f"{said}: the model may learn the length instead of the judgement"]

    def loss(
        self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0, kernel: Kernel | None = None
    ) -> tuple[Tensor, int]:
        found = scores(model, batch, reference=self.REFERENCE, kernel=kernel)
        own = self.losses(found, smoothing)
        return own.sum(), len(own)

    def judgements(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
    ) -> list[Figure]:
        metrics = [LOSS, ACCURACY, MARGIN, CHOSEN, REJECTED, *([KL] if self.has_base else []), NATS]
        parts = self._measured(model, examples, batch, between)
        return [Figure.of(m, *parts[m.name]) for m in metrics]

    @torch.no_grad()
    def _measured(
        self, model: nn.Module, examples: Sequence[Any], batch: int, between: Between
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns parts and weights of every figure; pairs of similar length share a batch."""
        order = sorted(range(len(examples)), key=lambda i: self.size(examples[i]))
        with evaluating(model):
            every = batches(self, model, [examples[i] for i in order], batch, between)
            found = [self._of_batch(compared(model, b)) for _, b in every]
        back = torch.tensor(order).argsort()
        return {
            name: (
                torch.cat([f[name][0] for f in found]).double().cpu()[back],
                torch.cat([f[name][1] for f in found]).double().cpu()[back],
            )
            for name in found[0]
        }

    def _of_batch(self, found: Compared) -> dict[str, tuple[Tensor, Tensor]]:
        own = found.scores
        chosen, rejected = self.rewards(own).chunk(2)
        one, margin = torch.ones_like(chosen), chosen - rejected
        length = own.tokens.view(2, -1)
        return {
            LOSS.name: (self.losses(own, 0.0), one),
            ACCURACY.name: (
                (1 + margin.sign()) / 2,
                one,
            ),  # the base has equal rewards, and half of the pairs
            MARGIN.name: (margin, one),
            CHOSEN.name: (chosen, one),
            REJECTED.name: (rejected, one),
            KL.name: (found.divergence.view(2, -1).sum(0), length.sum(0)),
            NATS.name: (-own.policy.chunk(2)[0], length[0]),
        }

    # -- the report

    def preview(self, examples: Sequence[Any]) -> list[list[list[Any]]]:
        return preview([(self._segment(e),) for e in examples], self.processor)

    def _segment(self, example: Any) -> Segment:
        ids, labels = self.sequences(example)[0]
        return Segment(ids, labels, torch.zeros_like(ids))

    def prompts(self, model: nn.Module, examples: Sequence[Any], n: int = SAMPLES) -> list[dict[str, str]]:
        return prompts(model, [(self._segment(e),) for e in examples], self.processor, n)

    def write(self, model: nn.Module, prompt: str, *, seed: int) -> str:
        options: dict[str, Any] = {"top_p": 0.95, "max_new_tokens": written(model)}
        return continuation(model, self.processor, prompt, seed=seed, temperature=TEMPERATURE, **options)

    def writing(self, model: nn.Module) -> Mapping[str, Any]:
        return {"temperature": TEMPERATURE, "tokens": written(model)}

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        losses = self._measured(model, examples, batch, nothing)[LOSS.name][0].tolist()
        order = sorted(range(len(examples)), key=lambda i: -losses[i])[:WORST]
        return {"worst": [{**self._shown(examples[i]), "loss": losses[i]} for i in order]}

    def _shown(self, example: Any) -> dict[str, str]:
        names = {"input": "prompt", "truth": "chosen", "answer": "rejected"}
        return {shown: str(self.processor.decode(example[name].tolist())) for shown, name in names.items()}
