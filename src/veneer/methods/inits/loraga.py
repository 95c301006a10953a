"""LoRA-GA: A0 = c V[:, :r]', B0 = c U[:, r:2r] from the gradient G = U S V' of the loss, for the best first
step of rank 2r.  Wang, Yu & Li 2024, https://arxiv.org/abs/2407.05000

With W' = W + s (B A - B0 A0) the first step of gradient descent at rate eta is W' - W = -eta s^2 (G A0' A0 +
B0 B0' G). To first order that is -eta s^2 c^2 times the best rank-2r approximation of G. Singular values do
not enter: the start is the same for any multiple of the loss. c = out^(1/4) / sqrt(gamma) keeps the size of
the outputs when the width changes, with the scaling of rsLoRA, alpha / sqrt(r). So alpha is 16 with
stabilised=True, and 16 sqrt(r), the same map, without.

State: the fixed start beside A and B, (in + out) r numbers that do not train.
Cost: a product of rank 2r, and a calibration before the training: forward and backward over `calibration`
windows.
Use: short trainings, in which the first steps decide; at the learning rate of full fine-tuning, not of LoRA
(the authors, LoRA-GA issue 12; training oscillates above it).
Against: the gain over LoRA shrinks if both have their own best rate (arXiv 2602.04998, within 1 to 2 %);
users did not reach the paper's GSM8K figure (LoRA-GA issue 13). PEFT 0.21.2 uses the name for another start:
it multiplies B by the singular values of G and scales B alone, so B shrinks with the loss and the first step
is not the best of its rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ConfigError, ShapeError, suggest
from veneer.methods.base.needs import GRADIENT
from veneer.methods.inits import Start

NEEDS = GRADIENT
# The directions among the leading 2r that go to A, and those that go to B; the names are the authors'.
DIRECTIONS = {
    "ArB2r": lambda r: (torch.arange(r), torch.arange(r, 2 * r)),
    "A2rBr": lambda r: (torch.arange(r, 2 * r), torch.arange(r)),
    "ArBr": lambda r: (torch.arange(1, 2 * r, 2), torch.arange(0, 2 * r, 2)),
}


def alpha(rank: int, stabilised: bool) -> float:
    return 16.0 if stabilised else 16.0 * math.sqrt(rank)


def start(s: Start, *, gamma: float = 16.0, direction: str = "ArB2r") -> tuple[Tensor, Tensor]:
    """Returns A (r, in) and B (out, r) with orthogonal rows and columns of length c.

    gamma: a larger value gives a smaller start; the authors use 16, and 64 for large models
    direction: ArB2r: A has the r leading directions, B the next r; A2rBr: the reverse; ArBr: alternating
    """
    if not 0 < gamma < math.inf:
        raise ConfigError(f"init_options: gamma must be a number above 0, got {gamma}")
    if direction not in DIRECTIONS:
        raise ConfigError(f"init_options: unknown direction {direction!r}{suggest(direction, DIRECTIONS)}")
    r, most = s.rank, min(s.W.shape)
    if direction == "ArBr" and 2 * r > most:
        raise ShapeError(
            f"direction 'ArBr' needs 2 x {r} directions, a layer {tuple(s.W.shape)} has {most}; use 'ArB2r'"
        )
    U, _, Vh = s.gradient(2 * r)
    missing = 2 * r - len(Vh)  # if 2r > min(out, in), the rest of B is zero and the first step is G itself
    rows, columns = (i.to(s.W.device) for i in DIRECTIONS[direction](r))
    c = s.W.shape[0] ** 0.25 / math.sqrt(gamma)
    return c * F.pad(Vh, (0, 0, 0, missing))[rows], c * F.pad(U, (0, missing))[:, columns]
