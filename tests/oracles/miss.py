"""MiSS and Bat (Kang & Yin 2024, arXiv 2409.15371, sections 3 and the appendix on Bat), written number by
number."""

import numpy as np


def weight(W, t, options):
    """Output o gets, for every piece of r inputs, the scalar product of that piece with row o of D."""
    changed = W.copy()
    r, rows = t["D"].shape[1], t["D"].shape[0]
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            changed[o, i] += t["D"][o % rows, i % r]
    return changed


def weight_from_bat(W, t, options):
    n, r, _ = t["B"].shape
    changed = np.empty_like(W)
    for i in range(n):
        for j in range(W.shape[1] // r):
            tile = W[i * r : (i + 1) * r, j * r : (j + 1) * r]
            changed[i * r : (i + 1) * r, j * r : (j + 1) * r] = tile + tile @ t["B"][i] + t["B"][i]
    return changed
