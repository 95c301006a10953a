"""Bottleneck adapters: Houlsby et al. 2019 (section 2.1), Pfeiffer et al. 2020, parallel: He et al. 2022 (3.3
and table 1).

D goes down to the bottleneck and U comes up again, each with a bias (a and u).
"""

import math

import torch

CURVES = {
    "relu": lambda z: z * (z > 0),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
}
# Behind which parts of a layer the adapters of a placement stand.
PARTS = {
    "houlsby": ("attention", "feed-forward"),
    "pfeiffer": ("feed-forward",),
    "parallel": ("feed-forward",),
}


def changed(t, placement, curve, x, h):
    """Returns the new output for input x and output h: sequential adapters read h, parallel ones x, times
    4."""
    read, s = (x, 4) if placement == "parallel" else (h, 1)
    return h + s * (CURVES[curve](read @ t["D"].T + t["a"]) @ t["U"].T + t["u"])
