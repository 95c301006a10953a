"""LoRA-Pro: A and B move so that B A follows full fine-tuning's gradient as nearly as it can.  Wang et al.
2024, https://arxiv.org/abs/2407.18242

dA = (B'B)^-1 gA / s^2 + X A and dB = (1 - P_B) gB (A A')^-1 / s^2 - B X have s (B dA + dB A) = G - (1 - P_B)
G (1 - P_A), the projection of the whole matrix's gradient G onto what A and B can change, for every X (r, r).

The form `full` is the published one: AdamW's moments of the projected gradient, as large as W, and Adam's
direction projected again. `factored` approximates it: the mean is kept as a pair of factors, carried along as
A and B move, and the second moment as sums of rows and columns (as in Adafactor,
https://arxiv.org/abs/1804.04235); no (out, in) matrix is made. `sgd` steps by dA and dB themselves.

The gradient is clipped by the norm of the projected one, which <gA, dA> + <gB, dB> gives. Weight decay
shrinks B A; the authors' code shrinks the frozen W as well.

State: full: 2 out x in numbers a layer, as full fine-tuning, each layer's in one process; factored:
(out + in)(r + 1) + 2 r^2, about half of AdamW's; sgd: none.
Cost: O((out + in) r^2 + r^3) a layer and step; full: 8 r out x in operations and a dozen passes over out x in
besides.
Use: to come nearer to full fine-tuning at a low rank. The rate is below LoRA's: the authors use full
fine-tuning's, and the built-in model wants three times that.
Against: users could not repeat the published figures (github.com/mrflogs/LoRA-Pro, issues 3, 7 and 9), and
where rates were tuned for each, variants of LoRA ended within 1 to 2 % of each other
(https://arxiv.org/abs/2602.04998). Undamped, the second step from B = 0 moves A by most of its length at any
rate; damping both Gram matrices by a hundredth of tr(A A') / r, which is not in the paper, bounds it by the
rate.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from veneer.errors import ConfigError, suggest
from veneer.ops.matrix.tangent import Choice
from veneer.optim.base.optimiser import Optimiser, Trained, check_damping
from veneer.optim.base.owned import owners
from veneer.optim.base.pairs import Pair, of
from veneer.optim.lorapro.factored import Factored
from veneer.optim.lorapro.forms import Full, Plain
from veneer.units import size

FORMS: dict[str, type[Full | Factored | Plain]] = {"full": Full, "factored": Factored, "sgd": Plain}


class LoRAPro(Optimiser):
    """LoRA-Pro. Damping 0 is the exact rule; the default damping keeps first steps from B = 0 small."""

    needs = frozenset({"A", "B"})

    def __init__(
        self,
        *,
        form: Literal["full", "factored", "sgd"] = "factored",
        x: Choice = "sylvester",
        damping: float = 1e-2,
    ) -> None:
        """
        form: full (the published one, with moments as large as the weights), factored (moments as large as
        the adapter), sgd (none)
        x: factor for the part that both can change: sylvester (the paper's), zero (A), symmetric (both)
        damping: added to both Gram matrices, relative to the mean eigenvalue of A A'; 0 is the
        paper's rule
        """
        for what, value, known in (("form", form, [*FORMS]), ("x", x, [*get_args(Choice)])):
            if value not in known:
                raise ConfigError(f"unknown {what} {value!r}{suggest(value, known)}")
        self.form, self.x, self.damping = form, x, check_damping(damping)

    @property
    def rated_as(self) -> str:
        return "lorapro-sgd" if self.form == "sgd" else "lorapro"

    def build(self, trained: Trained) -> torch.optim.Optimizer:
        return FORMS[self.form](trained, self.x, self.damping)

    def state_bytes(self, trained: Trained, processes: int = 1) -> int:
        pairs, others = of(trained.parts)
        loads = [self._numbers(p) * max(4, p.A.element_size()) for p in pairs]
        held = [0] * (processes if self.form == "full" else 1)
        dealt = owners([p.shape[0] * p.shape[1] for p in pairs], len(held))
        for owner, load in zip(dealt, loads, strict=True):
            held[owner] += load
        return max(held) + super().state_bytes(trained._replace(parts=others))

    def shared_bytes(self, trained: Trained, processes: int) -> int:
        if self.form != "full" or processes == 1:
            return 0
        pairs, _ = of(trained.parts)
        return sum(t.numel() * t.element_size() for p in pairs for t in (p.A, p.B))

    def _numbers(self, pair: Pair) -> int:
        m, n, r = pair.shape
        return {"full": 2 * m * n + 1, "factored": (m + n) * (r + 1) + 2 * r * r + 1, "sgd": 0}[self.form]

    def announcement(self, trained: Trained) -> str | None:
        if self.form != "full":
            return None
        full, factored = size(self.state_bytes(trained)), size(LoRAPro().state_bytes(trained))
        return (
            f"LoRA-Pro's full form keeps two matrices of every layer's size: {full};"
            f" form factored keeps {factored}"
        )
