"""Keeps working memory: fresh memory costs a page fault every 4 KiB, often more than the computation."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor
from torch._guards import active_fake_mode

LARGEST = 1 << 25  # bytes that are held on to
_own = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor with anything in it, in this thread's memory called `name`: valid until the next call
    for it.

    Memory is new where it is larger than LARGEST, on devices whose allocators keep it anyway, and for fake
    tensors.
    """
    n = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n > LARGEST or active_fake_mode() is not None:
        return torch.empty(shape, dtype=dtype, device=device)
    held: dict[str, Tensor] = vars(_own)
    if name not in held or held[name].numel() < n:
        with torch.inference_mode(False):  # whose tensors could not be written to outside of it
            held[name] = torch.empty(n, dtype=torch.uint8)
    return held[name][:n].view(dtype).view(shape)
