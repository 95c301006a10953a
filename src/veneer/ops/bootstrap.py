"""Confidence intervals of differences on a sample, by resampling its units.

Hesterberg 2014, What Teachers Should Know about the Bootstrap, section 3.2 and 4.5,
https://arxiv.org/abs/1411.5279
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from veneer.ops.draws import keyed

LEVEL = 0.95
DRAWS = 4000
AT_ONCE = 1 << 22  # numbers that are gathered at a time
FEWEST = 8  # units below which drawing them again says little about others


def interval(
    parts: Tensor, weights: Tensor, *, seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Returns the `level` interval of sum(parts) / sum(weights), or None for fewer than 8 units.

    parts, weights: (n,), of the units that were drawn independently, such as documents. Percentiles of the
    ratio in 4000 samples drawn from these, taken as far out as Student's t asks for: without that the
    interval of a small sample is too narrow.
    """
    n = len(parts)
    if n < FEWEST:
        return None
    both = torch.stack([parts, weights]).double()  # (2, n)
    draw, ratios = keyed(seed, f"bootstrap of {n}"), []
    rows = max(1, AT_ONCE // n)
    for at in range(0, DRAWS, rows):
        picked = torch.randint(n, (min(rows, DRAWS - at), n), generator=draw)
        above, below = both[:, picked].sum(-1)  # (rows,) each
        ratios.append(above / below)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student(0.5 + level / 2, n - 1))
    low, high = torch.quantile(
        torch.cat(ratios), torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ).tolist()
    return low, high


def student(p: float, degrees: int) -> float:
    """Returns the quantile of Student's t (Abramowitz & Stegun 26.7.5).

    Within 1 % from 7 degrees of freedom on.
    """
    z, v = NormalDist().inv_cdf(p), degrees
    return z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
