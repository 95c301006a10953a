"""GoRA: B0 = -gamma sqrt(in) / alpha * G A0' (A0 A0')^-1, a step along the gradient G.  He et al. 2025,
https://arxiv.org/abs/2502.12171

With the scaling of rsLoRA s B0 A0 = -gamma sqrt(in / r) G P, where P projects on A0's rows: about a step of
length gamma along G. The start acts: training begins one compressed step away from the base. G is the mean
gradient, and of it the leading part of rank 2 r that the calibration keeps. `veneer rank` turns the same
gradient into a rank for every layer.

State: none beyond the method's.
Cost: a calibration before the training.
Use: short trainings.
Against: the model starts away from the base, so the first evaluation is not the base's; a gamma that is too
large for the loss harms it.
"""

import math

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base.needs import MEAN_GRADIENT
from veneer.methods.inits import Start, kaiming

NEEDS = MEAN_GRADIENT


def alpha(rank: int, stabilised: bool) -> float:
    return 16.0 if stabilised else 16.0 * math.sqrt(rank)


def start(s: Start, *, gamma: float = 0.05) -> tuple[Tensor, Tensor]:
    """Returns A (r, in), LoRA's draw, and B (out, r) along the gradient.

    gamma: length of the first step along the gradient; the authors use 0.05
    """
    if not 0 < gamma < math.inf:
        raise ConfigError(f"init_options: gamma must be a number above 0, got {gamma}")
    U, S, Vh = s.gradient(2 * s.rank)
    A = kaiming.start(s._replace(lookup=False))[0]
    seen = (U * S) @ (Vh @ A.mT)  # G A', (out, r)
    B = torch.linalg.solve(A @ A.mT, seen.mT).mT
    return A, -gamma * math.sqrt(s.W.shape[1] / s.rank) / s.scaling * B
