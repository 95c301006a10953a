"""Methods that train little between frozen factors: LoLDU, LoRA-XS, VeRA, from their papers' formulas."""

import numpy as np


def loldu(W, t, options):
    """Shi et al. 2024: the residual W - sigma0 P L diag(z0) U stays, and sigma P L diag(z) U is trained."""
    residual = W - t["sigma0"] * (t["L"] * t["z0"]) @ t["U"]
    return residual + t["sigma"] * (t["L"] * t["z"]) @ t["U"]


def loraxs(W, t, options):
    """Balazy et al. 2024, equation 1, with A and B taken from numpy's SVD: signs of vectors cancel in A' R B'
    only if they agree."""
    r = len(t["R"])
    U, S, V = np.linalg.svd(W)
    signs = np.sign((t["A"] * V[:r]).sum(1))
    np.testing.assert_allclose(signs[:, None] * t["A"], V[:r], atol=1e-8)
    np.testing.assert_allclose(t["L"] * signs, U[:, :r] * S[:r], atol=1e-8)
    s = options.get("alpha", r) / r
    return W + s * (U[:, :r] * S[:r] * signs) @ t["R"] @ (signs[:, None] * V[:r])


def vera(W, t, options):
    """Kopiczko et al. 2023, equation 2."""
    scale = 2 / np.sqrt(W.shape[1] * len(t["d"]))
    return W + np.diag(t["b"]) @ t["B"] @ np.diag(scale * t["d"]) @ t["A"]
