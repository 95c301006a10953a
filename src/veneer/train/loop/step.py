"""One training step: micro-batches, one gradient, and one update unless a number is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import DataError
from veneer.optim.base.groups import Part, set_rates
from veneer.optim.base.paired import Paired
from veneer.tasks import Batch, Objective, Task
from veneer.train.loop.room import Room, is_lack
from veneer.train.mean import Mean
from veneer.train.speed.compiling import Shapes, eagerly
from veneer.train.speed.frozen_cache import Kept
from veneer.train.world import ALONE, World


class Outcome(NamedTuple):
    """One step. loss: mean over labels, smoothed as it was learned; norm: of the gradient before clipping.

    labels, tokens (sizes of examples) and positions (tokens and padding) are sums over the world. skipped:
    the reason why nothing was changed, or None.
    """

    loss: float
    norm: float
    labels: int
    tokens: int
    positions: int
    skipped: str | None

    def line(self, position: Any, rate: float, speed: float) -> dict[str, float | int | str | None]:
        """Returns the step for metrics.jsonl. position: after the step; speed: in tokens a second."""
        shown = {"loss": self.loss, "gradient_norm": self.norm}
        return {
            "step": position.step,
            **{k: None if self.skipped else v for k, v in shown.items()},
            "lr": rate,
            "labels": self.labels,
            "tokens": position.tokens,
            **({"skipped": self.skipped} if self.skipped else {}),
            "seconds": position.seconds,
            "tokens_per_second": speed,
        }


def under_autocast(objective: Objective, device: torch.device) -> Objective:
    """Returns the objective with matrix products in bfloat16 on weights that stay in float32."""

    def loss(model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(model, batch, smoothing=smoothing)

    return loss


def learning(model: nn.Module) -> None:
    """Puts the model into training mode, except batch norms: their statistics belong to the base."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class Learner(NamedTuple):
    """A model, its trained parameters, their optimiser and the task.

    objective: the task's loss, made fast; shapes: of the batches that run compiled; kept: cached hidden
    states of the frozen blocks; world: the processes that learn together;
    mean: of the parameters over the steps; room: of the memory; idle: on a divided base, an example for a
    process without a share, which must make as many passes as the others.
    """

    model: nn.Module
    parts: list[Part]
    optimiser: torch.optim.Optimizer
    task: Task
    objective: Objective
    clip: float  # largest norm of the gradient; 0: no clipping
    decay: float
    smoothing: float = 0.0  # of the labels in training
    shapes: Shapes | None = None
    kept: Kept | None = None
    world: World = ALONE
    mean: Mean | None = None
    room: Room | None = None
    idle: Any = None

    def step(self, micro: Sequence[Sequence[Any]], rate: float) -> Outcome:
        """Learns from the micro-batches of all processes as from one batch: the loss is a mean over all
        labels.

        If the loss or the gradient is not finite, no parameter and no moment changes. Raises DataError for a
        batch without labels.
        """
        labels = self.begin(micro)
        return self.finish(micro, self._fitting(micro, labels), rate)

    def begin(self, micro: Sequence[Sequence[Any]]) -> int:
        """Prepares a step and returns the number of labels in the world. Raises DataError if it is 0."""
        labels = int(self.world.sum(self._count(self.task.labels, micro)))
        if not labels:
            raise DataError(
                "no token of this batch is learned (every label is masked); give rows with a completion,"
                " or train_on='all'"
            )
        learning(self.model)
        self.optimiser.zero_grad(set_to_none=True)
        return labels

    def finish(self, micro: Sequence[Sequence[Any]], loss: float, rate: float) -> Outcome:
        """Updates with the gradient, unless it or the loss is not finite. loss: this process' share of the
        mean."""
        self._join_gradients()
        loss, norm = float(self.world.sum(loss)), self._clip()
        skipped = next(
            (f"{what} is {v}" for what, v in (("loss", loss), ("gradient", norm)) if not math.isfinite(v)),
            None,
        )
        if skipped is None:
            set_rates(self.optimiser, rate, self.decay)
            self.optimiser.step()
            if self.mean is not None:
                self.mean.update()
        self.optimiser.zero_grad(set_to_none=True)
        return Outcome(loss, norm, *self._sizes(micro), skipped)

    def _sizes(self, micro: Sequence[Sequence[Any]]) -> tuple[int, int, int]:
        """Returns labels, tokens and positions of the step in the world."""
        positions = sum(len(some) * self.task.width(some, self._widths()) for some in micro if some)
        counts = (self._count(self.task.labels, micro), self._count(self.task.size, micro), positions)
        labels, tokens, positions = (int(self.world.sum(n)) for n in counts)
        return labels, tokens, positions

    def _count(self, count: Any, micro: Sequence[Sequence[Any]]) -> int:
        return sum(count(example) for some in micro for example in some)

    def _join_gradients(self) -> None:
        """Replaces every gradient by its sum over the world; a parameter without one adds zero."""
        if self.world.size == 1:
            return
        parameters = [part.parameter for part in self.parts]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.world.join([p.grad for p in parameters if p.grad is not None])

    def _clip(self) -> float:
        parameters, most = [p.parameter for p in self.parts], self.clip or math.inf
        if isinstance(self.optimiser, Paired):  # some of these have a norm of their own
            return float(self.optimiser.clip(parameters, most))
        return float(nn.utils.clip_grad_norm_(parameters, most))

    def _fitting(self, micro: Sequence[Sequence[Any]], labels: int) -> float:
        """Returns `_backward`, in passes that fit the memory. Raises NoRoom."""
        if self.room is None or self.idle is not None or self.task.COMPARES:
            return self._backward(micro, labels)
        passes = self.room.cut(micro)
        while True:
            try:
                return self._backward(passes, labels)
            except RuntimeError as e:
                if not is_lack(e):
                    raise
                self.optimiser.zero_grad(set_to_none=True)
                passes = self.room.halve(passes, e)

    def _backward(self, micro: Sequence[Sequence[Any]], labels: int) -> float:
        device = self.parts[0].parameter.device
        total = torch.zeros((), dtype=torch.float64)
        for given in micro:
            some = given or [self.idle]
            short = self.shapes is not None and len(some) != self.shapes.rows
            width = self.task.width(some, self._widths())
            with eagerly(short), self.kept.passing(some, width) if self.kept else nullcontext():
                loss, _ = self.objective(self.model, self.batch(some, device), smoothing=self.smoothing)
                (loss / labels if given else 0 * loss).backward()
            total += loss.detach().cpu() if given else 0
        return float(total / labels)

    def batch(self, examples: Sequence[Any], device: torch.device) -> Batch:
        """Returns examples as the model takes them."""
        return {k: v.to(device) for k, v in self.task.collate(examples, self._widths()).items()}

    def _widths(self) -> tuple[int, ...]:
        return self.shapes.widths if self.shapes else ()
