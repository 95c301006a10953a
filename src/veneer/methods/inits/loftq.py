"""Q + s B A ~ W, beginning with Q of W.  Li et al. 2023, https://arxiv.org/abs/2310.08659

The quantised base belongs to it: veneer.compress.quantise computes A and B and has the formulas and the cost.
"""

from torch import Tensor

from veneer.methods.base.needs import RESIDUAL
from veneer.methods.inits import Start

NEEDS = RESIDUAL


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A = (S/s)^1/2 V' (r, in), B = U (S/s)^1/2 (out, r) of the residual that quantisation found."""
    return s.residual()
