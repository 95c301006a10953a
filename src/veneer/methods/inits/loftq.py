"""Q + s B A ~ W, beginning with Q of W.  Li et al. 2023, https://arxiv.org/abs/2310.08659

The base has been changed for it: see veneer.compress.quantise, which is where A and B come from, its formulas and its cost.
"""

from torch import Tensor

from veneer.methods.inits import Start

NEEDS = "residual"


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """A = (S/s)^1/2 V' (r, in), B = U (S/s)^1/2 (out, r) of what quantisation took apart."""
    return s.residual()
