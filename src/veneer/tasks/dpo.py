"""DPO: the chosen answer gains more over the base than the rejected one.

-log sigmoid(beta h), h = [log pi(y_w|x) - log r(y_w|x)] - [log pi(y_l|x) - log r(y_l|x)], sums over tokens.
Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from veneer.data.reading import Reading
from veneer.errors import ConfigError
from veneer.tasks.preference.options import check_above
from veneer.tasks.preference.pairs import Pairs
from veneer.tasks.preference.scores import Scores

Kind = Literal["sigmoid", "robust", "hinge"]


class DPO(Pairs):
    """Pairs of answers, measured by the loss, and by reward margins, accuracy and KL beside it.

    The reference is the base: the same model with its adapters off. label_smoothing: share of pairs that are
    taken to be judged the wrong way round.

    beta: strength of the tie to the base
    kind: sigmoid: DPO; robust: its unbiased form under smoothing; hinge: max(0, 1 - beta h)
    nll: weight of the chosen answer's nats per token, added to the loss
    """

    SETTINGS = (*Pairs.SETTINGS, "label_smoothing")

    def __init__(
        self, processor: Any, reading: Reading, *, beta: float = 0.1, kind: Kind = "sigmoid", nll: float = 0.0
    ) -> None:
        super().__init__(processor, reading)
        check_above(beta=beta)
        self.beta, self.kind, self.nll = beta, kind, nll

    def losses(self, found: Scores, smoothing: float) -> Tensor:
        gained, lost = found.gained.chunk(2)
        h = self.beta * (gained - lost)
        own = self._of_margin(h, smoothing)
        return own - self.nll * found.means.chunk(2)[0] if self.nll else own

    def _of_margin(self, h: Tensor, smoothing: float) -> Tensor:
        right, wrong = (F.relu(1 - h), F.relu(1 + h)) if self.kind == "hinge" else _sigmoid(h)
        if self.kind != "robust":
            return (1 - smoothing) * right + smoothing * wrong
        # Chowdhury et al. 2024, equation 12, https://arxiv.org/abs/2403.00409
        if smoothing >= 0.5:
            raise ConfigError(f"label_smoothing must be below 0.5 for kind 'robust', got {smoothing:g}")
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)

    def rewards(self, found: Scores) -> Tensor:
        return self.beta * found.gained


def _sigmoid(h: Tensor) -> tuple[Tensor, Tensor]:
    return -F.logsigmoid(h), -F.logsigmoid(-h)
