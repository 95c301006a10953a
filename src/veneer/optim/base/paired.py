"""Base of optimisers that step A and B of a layer together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.ops.matrix.linalg import precise
from veneer.optim.base import pairs
from veneer.optim.base.groups import by_rate
from veneer.optim.base.moments import direction
from veneer.optim.base.optimiser import Optimiser, Trained
from veneer.optim.base.pairs import Bucket

Present = tuple[nn.Parameter, nn.Parameter, str, float]  # A, B, where, scaling


class Paired(torch.optim.Optimizer, ABC):
    """Steps all pairs of one shape at once by `steps`, and other parameters (norms, biases) as AdamW does.

    A group of pairs has A and B of each in turn as `params`, with `where` and `scaling` of each; rates and
    decay are those of `groups.set_rates`: A and B both shrink by sqrt(1 - rate * decay), so that B A shrinks
    by it as a whole.
    """

    mixes: ClassVar[bool] = (
        False  # whether, on a CPU, `steps` takes pairs of one rank and several shapes together
    )

    def __init__(self, trained: Trained) -> None:
        found, others = pairs.of(trained.parts)
        self.betas = trained.betas
        listed: list[dict[str, Any]] = []
        for bucket in pairs.by_shape(found, mixed=self.mixes):
            scale = trained.embedding if bucket[0].embedding else 1.0
            names = {"where": tuple(p.where for p in bucket), "scaling": tuple(p.scaling for p in bucket)}
            listed.append(
                {
                    "params": [t for p in bucket for t in (p.A, p.B)],
                    "scale": scale,
                    "base": scale,
                    "share": bucket[0].share,
                    **names,
                }
            )
        listed += [{**group, "where": (), "scaling": ()} for group in by_rate(others, {}, trained.embedding)]
        super().__init__(listed, {"lr": 0.0, "weight_decay": 0.0})

    @abstractmethod
    def steps(self, bucket: Bucket) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Returns the descent of every A (r, n) and B (m, r) at rate 1; updates the states."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps with the current gradients. Raises NotFinite before any parameter of the shape is changed."""
        for group in self.param_groups:
            for p, change in self._changes(group):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change.to(p.dtype), alpha=group["lr"])

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scales gradients to a joint norm of at most `most`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, most)

    def own(self, present: list[Present]) -> list[Present]:
        """Returns the pairs that this process steps."""
        return present

    def buckets(self) -> Iterator[Bucket]:
        """Yields the pairs with gradients, one bucket per shape."""
        for group in self.param_groups:
            present = _present(group)
            if present:
                yield self._bucket(group, present)

    def _bucket(self, group: dict[str, Any], present: Sequence[Present]) -> Bucket:
        A, B, where, s = zip(*present, strict=True)
        return Bucket(
            [precise(p) for p in A],
            [precise(p) for p in B],
            [precise(p.grad) for p in A],
            [precise(p.grad) for p in B],
            torch.tensor(s, dtype=torch.float64).to(A[0])[:, None, None],
            where,
            [self.state[p] for p in A],
            [self.state[p] for p in B],
            group["lr"],
            1 - group["lr"] * group["weight_decay"],
        )

    def _changes(self, group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        present = self.own(_present(group))
        if present:
            dA, dB = self.steps(self._bucket(group, present))
            yield from zip((A for A, *_ in present), dA, strict=True)
            yield from zip((B for _, B, *_ in present), dB, strict=True)
        elif not group["where"]:
            yield from (
                (p, direction(self.state[p], p.grad, self.betas))
                for p in group["params"]
                if p.grad is not None
            )


class Rule(Optimiser, ABC):
    """An optimiser given by one rule for A and B and its options."""

    needs = frozenset({"A", "B"})

    @abstractmethod
    def steps(self, bucket: Bucket, betas: tuple[float, float]) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        """Returns the descent; see Paired.steps."""

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return Ruled(trained, self)


class Ruled(Paired):
    """The torch optimiser of a rule."""

    def __init__(self, trained: Trained, rule: Rule) -> None:
        super().__init__(trained)
        self.rule = rule

    def steps(self, bucket: Bucket) -> tuple[Iterable[Tensor], Iterable[Tensor]]:
        return self.rule.steps(bucket, self.betas)


def _present(group: dict[str, Any]) -> list[Present]:
    every = (
        zip(group["params"][::2], group["params"][1::2], group["where"], group["scaling"], strict=True)
        if group["where"]
        else ()
    )
    return [found for found in every if found[0].grad is not None and found[1].grad is not None]
