"""LoKr's formula (Yeh et al. 2023, section 3.2), block by block."""

import numpy as np


def weight(W, t, options):
    rank = options["rank"]
    L = t["L"] if "L" in t else t["Lb"] @ t["La"]
    R = t["R"] if "R" in t else t["B"] @ t["A"]
    s = (options.get("alpha") or rank) / rank
    return W + s * np.block([[number * R for number in row] for row in L])
