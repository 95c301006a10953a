"""B A = 0 with neither factor zero: A = Q[::2]' G, B = H Q[1::2] for a random orthogonal Q (r, r) and
Gaussian G, H. Datta 2024, https://datta0.github.io/posts/rethink-lora-init/

Both factors learn from the first step on. Odd and even rows of Q are orthogonal, so the start is the base. As
in PEFT the numbers in G and H have one size at every width, so wide layers start with long factors: lower
`size` as the width grows, and compare the learning rate with LoRA's own best one.

State: the fixed start beside A and B: rounding errors of B A are subtracted, so the start is the base bit for
bit.
Cost: a product of rank 2r.
Use: to test whether two factors that learn from the first step on help.
Against: without a paper; the only results are the author's own.
"""

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base.needs import NOTHING
from veneer.methods.inits import Start

NEEDS = NOTHING


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start, *, size: float = 0.1) -> tuple[Tensor, Tensor]:
    """Returns A (r, in), B (out, r), each of rank r/2. At rank 1 only A is drawn, and B = 0.

    size: standard deviation of the numbers in G and H
    """
    if not size > 0:
        raise ConfigError(f"init_options: size must be a number above 0, got {size}")
    (out, in_), r = s.W.shape, s.rank
    square, G, H = (
        torch.randn(shape, generator=s.draw).to(s.W) for shape in ((r, r), ((r + 1) // 2, in_), (out, r // 2))
    )
    Q = torch.linalg.qr(square).Q
    return size * Q[0::2].mT @ G, size * H @ Q[1::2]
