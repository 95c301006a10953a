"""A uniform in +-1/sqrt(in), B = 0: the start of LoRA's own code.  Hu et al. 2021,
https://arxiv.org/abs/2106.09685"""

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
    A = (2 * torch.rand(s.rank, in_, generator=s.draw) - 1) / math.sqrt(in_)
    return A.to(s.W), s.W.new_zeros(out, s.rank)
