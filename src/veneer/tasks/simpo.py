"""SimPO: the mean log-probability of the chosen answer exceeds the rejected one's by a margin. No reference.

-log sigmoid(beta (p_w - p_l) - gamma), where p is the mean log-probability of an answer's tokens.
Meng et al. 2024, equation 6, https://arxiv.org/abs/2405.14734
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from veneer.data.reading import Reading
from veneer.tasks.preference.options import check_above
from veneer.tasks.preference.pairs import Pairs
from veneer.tasks.preference.scores import Scores


class SimPO(Pairs):
    """Pairs of answers, learned without a reference by their mean log-probabilities.

    beta: scale of the difference; the paper uses 2 to 2.5
    gamma: margin to exceed, already multiplied by beta; the paper uses 0.3 to 0.5 of beta
    nll: weight of the chosen answer's nats per token, added to the loss
    """

    REFERENCE = False

    def __init__(
        self, processor: Any, reading: Reading, *, beta: float = 2.0, gamma: float = 1.0, nll: float = 0.0
    ) -> None:
        super().__init__(processor, reading)
        check_above(beta=beta)
        self.beta, self.gamma, self.nll = beta, gamma, nll

    def losses(self, found: Scores, smoothing: float) -> Tensor:
        won, lost = found.means.chunk(2)
        own = -F.logsigmoid(self.beta * (won - lost) - self.gamma)
        return own - self.nll * won if self.nll else own

    def rewards(self, found: Scores) -> Tensor:
        return self.beta * found.means
