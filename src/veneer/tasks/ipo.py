"""IPO: the chosen answer's gain over the base exceeds the rejected one's by 1 / (2 beta), and no more.

(gain_w / n_w - gain_l / n_l - 1 / (2 beta))^2, with means over the n tokens of an answer. The paper prints
sums; its authors confirmed the means. Azar et al. 2023, equation 17, https://arxiv.org/abs/2310.12036
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from veneer.data.reading import Reading
from veneer.tasks.preference.options import check_above
from veneer.tasks.preference.pairs import Pairs
from veneer.tasks.preference.scores import Scores


class IPO(Pairs):
    """Pairs of answers, as of dpo, by a squared distance that does not reward ever larger margins.

    beta: strength of the tie to the base, tau in the paper
    """

    def __init__(self, processor: Any, reading: Reading, *, beta: float = 0.1) -> None:
        super().__init__(processor, reading)
        check_above(beta=beta)
        self.beta = beta

    def losses(self, found: Scores, smoothing: float) -> Tensor:
        gained, lost = (found.gained / found.tokens).chunk(2)
        return (gained - lost - 1 / (2 * self.beta)).square()

    def rewards(self, found: Scores) -> Tensor:
        return self.beta * found.gained / found.tokens
