"""A normal, B = 0, as LoRA's paper has it (section 4.1), with the variance of the uniform start, 1/(3 in).

PEFT's start of this name has variance 1/r^2 at every width, so its best learning rate differs from the
default start's by the ratio of the two. Here only the shape of the distribution differs.
"""

import math

import torch
from torch import Tensor

from veneer.methods.base.needs import NOTHING
from veneer.methods.inits import Start

NEEDS = NOTHING


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A (r, in), B (out, r) with B A = 0. For token ids A is zero and B is drawn."""
    out, in_ = s.W.shape
    if s.lookup:
        return s.of_tokens()
    A = torch.randn(s.rank, in_, generator=s.draw) / math.sqrt(3 * in_)
    return A.to(s.W), s.W.new_zeros(out, s.rank)
