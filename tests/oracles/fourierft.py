"""FourierFT (Gao et al. 2024, section 3.2), as sums of cosines: the real part of an inverse transform,
written out."""

import numpy as np


def weight(W, t, options):
    out, in_ = W.shape
    scaling = options.get("scaling") or options["rms"] * np.sqrt(2) * out * in_
    p, q = np.arange(out)[:, None], np.arange(in_)
    changed = W.copy()
    pairs = zip(t["rows"], t["columns"], t["c"], strict=True)
    if t["c"].ndim == 2:
        pairs = [(j, k, t["c"][a, b]) for a, j in enumerate(t["rows"]) for b, k in enumerate(t["columns"])]
    for j, k, c in pairs:
        changed = changed + scaling / (out * in_) * c * np.cos(2 * np.pi * (p * j / out + q * k / in_))
    return changed
