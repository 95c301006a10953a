"""B A = 0 with neither factor zero: A = Q[::2]' G, B = H Q[1::2] for a random orthogonal Q (r, r) and Gaussian G, H.
Datta 2024, https://datta0.github.io/posts/rethink-lora-init/

Both factors learn from the first step on, and the layer starts as it was because odd and even rows of Q are orthogonal. As
in PEFT the numbers in G and H have one size whatever the layer's width, so that wide layers start with long factors: `size`
is to be lowered with the width, and the learning rate compared with LoRA's own best one.

State: the fixed start beside A and B: what rounding leaves of B A is subtracted, so that the layer starts as the base bit for bit.
Cost: a product of rank 2r.
Use: to try whether two factors that learn from the first step on help.
Against: there is no paper on it, and no result beyond the author's own.
"""

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.inits import Start

NEEDS = ""


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start, *, size: float = 0.1) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r), each of rank r/2. At rank 1 there is no room for both: A is drawn, B = 0.

    size: standard deviation of the numbers in G and H
    """
    if not size > 0:
        raise ConfigError(f"init_options: size must be a number above 0, not {size}")
    (out, in_), r = s.W.shape, s.rank
    square, G, H = (
        torch.randn(shape, generator=s.draw).to(s.W) for shape in ((r, r), ((r + 1) // 2, in_), (out, r // 2))
    )
    Q = torch.linalg.qr(square).Q
    return size * Q[0::2].mT @ G, size * H @ Q[1::2]
