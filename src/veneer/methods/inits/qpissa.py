"""Q + s B A ~ W from the leading part of W: PiSSA on a quantised residual.  Meng et al. 2024,
https://arxiv.org/abs/2404.02948

The quantised base belongs to it: veneer.compress.quantise computes A and B and has the formulas and the cost.
"""

from torch import Tensor

from veneer.methods.base.needs import RESIDUAL
from veneer.methods.inits import Start

NEEDS = RESIDUAL


def alpha(rank: int, stabilised: bool) -> float:
    return 1.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A = (S/s)^1/2 V' (r, in), B = U (S/s)^1/2 (out, r) of the residual that quantisation found."""
    return s.residual()
