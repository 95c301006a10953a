"""KeepLoRA: A0 = leading directions of the loss's gradient outside W's main input directions, B0 = 0.  Luo et
al. 2026, https://arxiv.org/abs/2601.19659

With A frozen (`--method lorafa`) the change reads none of the directions M that carry most of W, so (W' - W)
M = 0 whatever is learned. M are W's leading right singular vectors with the share `protected` of its squared
norm. A has orthonormal rows. PEFT-Arena's port starts B elsewhere; this is the authors' own start. Directions
of former tasks' inputs, which the paper adds to M, are not collected here.

State: none beyond the method's.
Cost: a singular value decomposition of every weight, and a calibration before the training.
Use: a new task on a model whose old abilities must stay.
Against: less room to learn: of the gradient only the part outside M counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ConfigError
from veneer.methods.base.needs import GRADIENT
from veneer.methods.inits import Start

NEEDS = GRADIENT


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start, *, protected: float = 0.5) -> tuple[Tensor, Tensor]:
    """Returns A (r, in) with orthonormal rows, and B (out, r) zero. A row without a direction left is zero.

    protected: share of W's squared norm whose directions are never read
    """
    if not 0 < protected < 1:
        raise ConfigError(f"init_options: protected must be above 0 and below 1, got {protected}")
    _, S, Vh = torch.linalg.svd(s.W, full_matrices=False)
    share = S.square().cumsum(0) / S.square().sum().clamp_min(torch.finfo(S.dtype).tiny)
    M = Vh[: int((share < protected).sum()) + 1]
    _, size, V = s.gradient(2 * s.rank)
    left = size[:, None] * (V - (V @ M.mT) @ M)
    _, sizes, rows = torch.linalg.svd(left, full_matrices=False)
    rows = rows - (rows @ M.mT) @ M  # again, for the rounding of small directions
    known = sizes > 1e-6 * size[0].clamp_min(torch.finfo(S.dtype).tiny)
    A = (F.normalize(rows) * known[:, None])[: s.rank]
    return F.pad(A, (0, 0, 0, s.rank - len(A))), s.W.new_zeros(s.W.shape[0], s.rank)
