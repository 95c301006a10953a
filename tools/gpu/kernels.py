"""The kernel for base and adapters at once, beside PyTorch's two steps."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from gpu.parts import Skipped
from veneer.ops import fused
from veneer.ops.fused import trial
from veneer.serve.kernels import EXACT

WIDTHS = (1024, 4096)
RANK = 16


def one_pass(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Seconds of the kernel over those of two steps by rows an adapter, in bfloat16, for two widths.

    On a processor Triton's interpreter runs it, in float32 and small: its seconds mean nothing.
    """
    if not importlib.util.find_spec("triton"):
        raise Skipped("the package triton is not installed")
    figures: dict[str, Any] = {"problems": []}
    with _interpreted() if device == "cpu" else nullcontext():
        _measure(figures, device, tiny)
    return figures


@contextmanager
def _interpreted() -> Iterator[None]:
    """Has Triton interpret the kernel, which decides that as its module is imported."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        _forget()
        yield
        _forget()


def _forget() -> None:
    sys.modules.pop(f"{fused.__name__}.kernel", None)
    vars(fused).pop("kernel", None)


def _measure(figures: dict[str, Any], device: str, tiny: bool) -> None:
    for width in (32,) if tiny else WIDTHS:
        dtype = torch.float32 if tiny else torch.bfloat16
        W = torch.randn(width, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        found = trial.trial(W, RANK, sizes=(1, 20) if tiny else trial.SIZES, repeats=1 if tiny else 20)
        for t in found:
            figures[f"one_pass_h{width}_{t.rows}_rows_over_two_steps"] = t.kernel / t.steps
        figures[f"one_pass_h{width}_off"] = off = max(t.off for t in found)
        if not off <= EXACT * torch.finfo(dtype).eps:
            figures["problems"].append(f"width {width}: rows are {off:.2g} off")
