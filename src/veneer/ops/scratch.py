"""Working memory that is used again: on a CPU every 4 KiB of fresh memory cost a page fault, often more than
what is computed in them."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LARGEST = 1 << 25  # bytes that are held on to
_own = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with anything in it, in this thread's memory called `name`: valid until that is asked for
    again.

    New memory where it is larger than LARGEST, and on devices whose allocators keep it anyway.
    """
    n = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n > LARGEST:
        return torch.empty(shape, dtype=dtype, device=device)
    held: dict[str, Tensor] = vars(_own)
    if name not in held or held[name].numel() < n:
        with torch.inference_mode(False):  # whose tensors could not be written to outside of it
            held[name] = torch.empty(n, dtype=torch.uint8)
    return held[name][:n].view(dtype).view(shape)
