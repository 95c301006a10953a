"""GaLore: Adam in the leading subspace of every weight's gradient, for training all weights.  Zhao et al.
2024, https://arxiv.org/abs/2403.03507

For W (m, n) with m <= n and P (m, r) spanning the leading left singular vectors of its gradient G:  R = P'G
(r, n), W <- W - lr scale P adam(R); for m > n the right ones, on the other side. Embeddings, norms and biases
step as AdamW does. P follows the gradient every `period` steps by one warm-started subspace iteration, P <-
orth(G G' P), 4 m n r operations where the authors' code takes a whole SVD; and the moments follow P: with C =
P_new' P_old, M <- C M, and V <- (C o C) V, what the squares are if their numbers are independent. (The
authors' code leaves both in the old basis.)

State: P and two moments, r (m + 2 n) numbers for a weight, where AdamW keeps 2 m n.
Cost: 4 m n r operations a weight and step for the projections, and as many every `period` steps for the
subspace.
Use: to train all weights, from nothing or from a base, where AdamW's moments do not fit; the whole gradient
must.
Against: behind full-rank Adam at equal tokens in the paper's own tables; every period is a small shock; the
scale and the rate are one number in two places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, first_few
from veneer.ops.draws import keyed
from veneer.ops.matrix.linalg import leading_svd, precise
from veneer.optim.base.groups import FACTORS, Part, by_rate
from veneer.optim.base.moments import State, count, direction
from veneer.optim.base.optimiser import Optimiser, Trained


class GaLore(Optimiser):
    """Steps of rank r on the weights themselves."""

    def __init__(self, *, rank: int = 128, period: int = 200, scale: float = 0.25, adam: bool = True) -> None:
        """
        rank: of the subspace, or the whole space of a smaller weight
        period: steps between changes of the subspace
        scale: multiple of the projected step, the paper's alpha
        adam: Adam in the subspace; without, plain gradient descent
        """
        problems = [
            f"{name} must be >= 1, got {value}"
            for name, value in (("rank", rank), ("period", period))
            if value < 1
        ]
        problems += [f"scale must be > 0, got {scale:g}"] if not scale > 0 else []
        if problems:
            raise ConfigError("\n".join(problems))
        self.rank, self.period, self.scale, self.adam = rank, period, scale, adam

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        factors = [p.name for p in trained.parts if p.role in FACTORS]
        if factors:
            raise ConfigError(
                f"optimiser 'galore' projects gradients of full weights, but {first_few(factors, 2)} are"
                " low-rank"
                " factors; use method 'full' or another optimiser"
            )
        return Projected(trained, self)

    def state_bytes(self, trained: Trained, processes: int = 1) -> int:
        other = Trained([p for p in trained.parts if not _is_projected(p)])
        shapes = [(p.parameter.shape[0], p.parameter[0].numel()) for p in trained.parts if _is_projected(p)]
        return super().state_bytes(other) + sum(
            4 * min(self.rank, *s) * (min(s) + (2 * max(s) if self.adam else 0)) + 4 for s in shapes
        )


def _is_projected(part: Part) -> bool:
    return part.role == "matrix" and not part.embedding


class Projected(torch.optim.Optimizer):
    """The torch optimiser. `names` of a group: its projected weights, () for parameters stepped by AdamW."""

    def __init__(self, trained: Trained, how: GaLore) -> None:
        self.betas, self.how = trained.betas, how
        matrices = [p for p in trained.parts if _is_projected(p)]
        names = {id(p.parameter): p.name for p in matrices}
        listed: list[dict[str, Any]] = []
        for group in by_rate(matrices, {}, trained.embedding):
            listed.append({**group, "names": tuple(names[id(p)] for p in group["params"])})
        others = by_rate([p for p in trained.parts if not _is_projected(p)], {}, trained.embedding)
        super().__init__(
            [*listed, *({**group, "names": ()} for group in others)], {"lr": 0.0, "weight_decay": 0.0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps with the current gradients."""
        for group in self.param_groups:
            names = group["names"] or [""] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                change = (
                    self._projected(p.grad.flatten(1), state, name)
                    if name
                    else direction(state, p.grad, self.betas)
                )
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                    change.view_as(p).to(p.dtype), alpha=group["lr"]
                )

    def _projected(self, G: Tensor, state: State, name: str) -> Tensor:
        wide = G.shape[0] <= G.shape[1]
        G = precise(G if wide else G.mT)  # (short, long)
        if int(state.get("step", torch.zeros(()))) % self.how.period == 0:
            follow(state, G, min(self.how.rank, len(G)), name)
        R = state["P"].mT @ G
        if self.how.adam:
            R = direction(state, R, self.betas)
        else:
            count(state)
        change = self.how.scale * (state["P"] @ R)
        return change if wide else change.mT


def follow(state: State, G: Tensor, rank: int, name: str) -> None:
    """Returns P (short, r) for the gradient G (short, long), and moments in its basis; stores both."""
    old = state.get("P")
    if old is None:
        state["P"] = leading_svd(G, rank, keyed(0, name))[0].contiguous()
        return
    state["P"] = torch.linalg.qr(G @ (G.mT @ old)).Q
    turn = state["P"].mT @ old  # (r, r)
    if "exp_avg" in state:
        state["exp_avg"] = turn @ state["exp_avg"]
        state["exp_avg_sq"] = turn.square() @ state["exp_avg_sq"]
