"""LoHa's formula (Hyeon-Woo et al. 2021, section 2.2, and LyCORIS' scale alpha / r)."""

import numpy as np


def weight(W, t, options):
    r = options["rank"]
    s = (options.get("alpha") or r) / r
    X, Y = (sum(np.outer(t[f"B{k}"][:, i], t[f"A{k}"][i]) for i in range(r)) for k in (1, 2))
    return W + s * np.multiply(X, Y)
