"""NF4 and int8 from QLoRA's words (sections 2 and 3, appendix E) in numpy: levels from the normal
distribution, nearest level."""

from statistics import NormalDist

import numpy as np


def nf4_levels():
    """16 levels in [-1, 1]: 8 quantiles above 0 and 7 below, evenly spaced in probability, and 0."""
    quantile = NormalDist().inv_cdf
    tail = (1 / 32 + 1 / 30) / 2
    above = [quantile(p) for p in np.linspace(1 - tail, 0.5, 9)[:8]]
    below = [quantile(p) for p in np.linspace(tail, 0.5, 8)[:7]]
    levels = np.sort(np.array([*below, 0.0, *above]))
    return levels / np.abs(levels).max()


def nearest(W, levels, scale):
    """The level times scale nearest to every number of W; scale broadcasts to W."""
    candidates = levels * scale[..., None]
    return np.take_along_axis(candidates, np.abs(W[..., None] - candidates).argmin(-1)[..., None], -1)[..., 0]
