"""s B A = the leading rank-r part of W, evenly split.  Meng et al. 2024, https://arxiv.org/abs/2404.02948"""

from torch import Tensor

from veneer.methods.base.needs import LEADING
from veneer.methods.inits import Start

NEEDS = LEADING


def alpha(rank: int, stabilised: bool) -> float:
    return 1.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A = (S/s)^1/2 V' (r, in), B = U (S/s)^1/2 (out, r), by a seeded, oversampled randomised SVD."""
    U, S, Vh = s.leading()
    root = (S / s.scaling).sqrt()
    return root[:, None] * Vh, U * root
