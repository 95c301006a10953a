"""One dtype for queries, keys and values, as autocast gives it to PyTorch's own attention.

Under autocast rotated queries and keys are float32 beside bfloat16 values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def alike(*parts: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors in autocast's dtype for their device, and unchanged without autocast."""
    kind = parts[0].device.type
    if not torch.is_autocast_enabled(kind):
        return parts
    return tuple(part.to(torch.get_autocast_dtype(kind)) for part in parts)
