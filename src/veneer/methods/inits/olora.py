"""B, A = the leading columns of Q and rows of R in W = Q R.  Buyukakyuz 2024,
https://arxiv.org/abs/2406.01775"""

import torch
from torch import Tensor

from veneer.methods.base.needs import WEIGHT
from veneer.methods.inits import Start
from veneer.ops.matrix.linalg import check_rank, precise

NEEDS = WEIGHT


def alpha(rank: int, stabilised: bool) -> float:
    return 1.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A = Q' W (r, in), B = Q (out, r); Q spans the first r columns of W, as in the whole QR.

    Q of W's leading r columns is the leading part of W's own Q, and R[:r] = Q[:, :r]' W. The whole
    decomposition of the paper (section 3) costs in/r times as much.
    """
    check_rank(s.rank, s.W)
    W = precise(s.W)
    Q = torch.linalg.qr(W[:, : s.rank]).Q
    return Q.mT @ W, Q
