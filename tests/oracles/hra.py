"""HRA (Yuan et al. 2024, section 3.1): W times the reflections, one after the other."""

import numpy as np


def weight(W, t, options):
    for u in t["U"].T:
        u = u / np.sqrt(u @ u)
        W = W @ (np.eye(len(u)) - 2 * np.outer(u, u))
    return W
