"""DoRA (Liu et al. 2024, equation 5), with W stored (out, in): the paper's columns are our rows."""

import numpy as np

from oracles.lora import scale


def weight(W, t, options):
    V = W + scale(options) * t["lora.B"] @ t["lora.A"]
    rows = [m * v / np.sqrt(sum(v**2)) for m, v in zip(t["m"], V, strict=True)]
    return np.stack(rows)
