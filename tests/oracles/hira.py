"""HiRA's formula (Huang et al. 2025, section 3)."""

import numpy as np


def weight(W, t, options):
    return W + np.multiply(W, sum(np.outer(b, a) for b, a in zip(t["B"].T, t["A"], strict=True)))
