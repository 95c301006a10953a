"""One training step: micro-batches, one gradient, one update, or none if a number is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.pack import Window, collate, n_labels, n_tokens, width
from veneer.errors import DataError
from veneer.optim.base.groups import Part, set_rates
from veneer.optim.base.paired import Paired
from veneer.tasks import Batch, Objective
from veneer.train.speed.compiling import Shapes, eagerly
from veneer.train.speed.frozen_cache import Kept


class Outcome(NamedTuple):
    """loss: nats per learned token, smoothed as it was learned; norm: of the gradient before clipping; positions: tokens and
    padding; skipped: why nothing was changed, or None."""

    loss: float
    norm: float
    labels: int
    tokens: int
    positions: int
    skipped: str | None


def under_autocast(objective: Objective, device: torch.device) -> Objective:
    """The objective with matrix products in bfloat16 on weights that stay in float32."""

    def loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(model, batch, smoothing=smoothing)

    return loss


class Learner(NamedTuple):
    """A model, what is trained of it, and by what. shapes: of the batches that run compiled, None where nothing does; kept: what
    leaves the frozen blocks, where they are not computed again."""

    model: nn.Module
    parts: list[Part]
    optimiser: torch.optim.Optimizer
    objective: Objective
    pad: int
    clip: float  # largest norm of the gradient; 0: not clipped
    decay: float
    smoothing: float = 0.0  # of the labels that its steps learn
    shapes: Shapes | None = None
    kept: Kept | None = None

    def step(self, micro: Sequence[Sequence[Window]], rate: float) -> Outcome:
        """Learns from the micro-batches as from one batch: the loss is a mean over all their labels together.

        If the loss or the gradient is not finite, no parameter and no moment changes. Raises DataError without a label.
        """
        labels = self.begin(micro)
        return self.finish(micro, self._backward(micro, labels), rate)

    def begin(self, micro: Sequence[Sequence[Window]]) -> int:
        """Gets ready to learn from the micro-batches: the number of their labels. Raises DataError if there is none."""
        labels = sum(n_labels(windows) for windows in micro)
        if not labels:
            raise DataError(
                "no token of this batch is learned (every label is masked); give rows with a completion, or train_on='all'"
            )
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        return labels

    def finish(self, micro: Sequence[Sequence[Window]], loss: float, rate: float) -> Outcome:
        """The update with the gradient that is there, unless it or the loss is not finite."""
        norm = self._clip()
        skipped = next(
            (f"{what} is {v}" for what, v in (("loss", loss), ("gradient", norm)) if not math.isfinite(v)),
            None,
        )
        if skipped is None:
            set_rates(self.optimiser, rate, self.decay)
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        positions = sum(len(windows) * width(windows, self._widths()) for windows in micro)
        labels, tokens = (sum(map(count, micro)) for count in (n_labels, n_tokens))
        return Outcome(loss, norm, labels, tokens, positions, skipped)

    def _clip(self) -> float:
        parameters, most = [p.parameter for p in self.parts], self.clip or math.inf
        if isinstance(self.optimiser, Paired):  # some of these have a norm of their own
            return float(self.optimiser.clip(parameters, most))
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def _backward(self, micro: Sequence[Sequence[Window]], labels: int) -> float:
        device = self.parts[0].parameter.device
        total = torch.zeros((), dtype=torch.float64)
        for windows in micro:
            short = self.shapes is not None and len(windows) != self.shapes.rows
            with (
                eagerly(short),
                self.kept.passing(windows, width(windows, self._widths())) if self.kept else nullcontext(),
            ):
                loss, _ = self.objective(self.model, self.batch(windows, device), smoothing=self.smoothing)
                (loss / labels).backward()
            total += loss.detach().cpu()
        return float(total / labels)

    def batch(self, windows: Sequence[Window], device: torch.device) -> Batch:
        """Windows as the model takes them."""
        return {k: v.to(device) for k, v in collate(windows, self.pad, self._widths()).items()}

    def _widths(self) -> tuple[int, ...]:
        return self.shapes.widths if self.shapes else ()
