"""ORPO: the chosen answer is learned as text, and its odds against the rejected one's grow. No reference.

-p_w - lambda log sigmoid(log odds_w - log odds_l), log odds = p - log(1 - e^p), where p is the mean
log-probability of an answer's tokens. Hong et al. 2024, equations 4 to 7, https://arxiv.org/abs/2403.07691
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.data.reading import Reading
from veneer.tasks.preference.options import check_above
from veneer.tasks.preference.pairs import Pairs
from veneer.tasks.preference.scores import Scores


class ORPO(Pairs):
    """Pairs of answers, learned without a reference: the nats of the chosen one and a ratio of odds.

    beta: weight of the odds ratio, lambda in the paper
    """

    REFERENCE = False

    def __init__(self, processor: Any, reading: Reading, *, beta: float = 0.1) -> None:
        super().__init__(processor, reading)
        check_above(beta=beta)
        self.beta = beta

    def losses(self, found: Scores, smoothing: float) -> Tensor:
        won, lost = log_odds(found.means).chunk(2)
        return -found.means.chunk(2)[0] - self.beta * F.logsigmoid(won - lost)

    def rewards(self, found: Scores) -> Tensor:
        return self.beta * found.means


def log_odds(p: Tensor) -> Tensor:
    """Returns log(e^p / (1 - e^p)) of log-probabilities p < 0, exact near 0 and far from it."""
    # 1 - e^p by the form that loses no digits (Maechler 2012, equation 7); p = 0 would be infinite odds.
    p = p.clamp(max=-torch.finfo(p.dtype).tiny)
    near = p > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, p, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, p)))
    return p - torch.where(near, small, large)
