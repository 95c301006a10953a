"""RandLoRA (Albert et al. 2025, equation 4), the n terms one by one."""

import numpy as np


def weight(W, t, options):
    rank, n = t["l"].shape
    flat = t["B"].reshape(len(t["B"]), -1)  # the random columns, in the order in which PEFT hands them out
    total = 0.0
    for j in range(n):
        B = flat[:, [i * n + j for i in range(rank)]]
        total = total + B @ np.diag(t["l"][:, j]) @ t["A"] @ np.diag(t["g"][j])
    s = (options["alpha"] if "alpha" in options else 20 * rank) / rank
    return W + s * (total if W.shape[1] <= W.shape[0] else total.T)
