"""LoRA (Hu et al. 2021, section 4.1; scaling: section 4.1 and Kalajdzievski 2023, theorem 3.2)."""

import numpy as np


def scale(options, per_rank=2):
    r = options.get("rank", 8)
    alpha = options.get("alpha", per_rank * r)
    return alpha / r**0.5 if options.get("stabilised") else alpha / r


def weight(W, t, options):
    return W + scale(options) * np.einsum("or,ri->oi", t["B"], t["A"])


def weight_from_pissa(W, t, options):
    """Meng et al. 2024: trained factors on the residual W - s B0 A0, where s B0 A0 is W's best rank-r
    part."""
    s, r = scale(options, 1), options["rank"]
    U, S, V = np.linalg.svd(W)
    residual = W - (U[:, :r] * S[:r]) @ V[:r]
    return residual + s * t["B"] @ t["A"]


def weight_from_olora(W, t, options):
    """Buyukakyuz 2024, algorithm 1: trained factors on W - s Q_r R_r."""
    s, r = scale(options, 1), options["rank"]
    Q, R = np.linalg.qr(W)
    return W - s * Q[:, :r] @ R[:r] + s * t["B"] @ t["A"]
