"""Decides by a trial on the GPU if a server computes base and adapters in one kernel."""

from __future__ import annotations

import importlib.util
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.banks.one_pass import one_pass_bank
from veneer.adapt.banks.segments import SegmentBank
from veneer.errors import ConfigError
from veneer.ops.fused import product, trial

log = logging.getLogger("veneer.serve")
RANK = 16  # of the adapters in the trial
EXACT = 8  # relative error of the kernel, in roundings of the weight's dtype


def bank(model: nn.Module) -> SegmentBank:
    """Returns the bank that was faster in a trial on the model's most common layer.

    Raises ConfigError without a GPU or Triton, and for a model whose layers the kernel does not take.
    """
    W = _typical(model)
    missing = None if importlib.util.find_spec("triton") else "the package triton is not installed"
    missing = missing or (None if W is not None and W.is_cuda else "the model has no linear layer on a GPU")
    if missing is None and W is not None and not product.fits(W, RANK):
        missing = f"the kernel does not take weights of {W.dtype}"
    if missing or W is None:
        raise ConfigError(f"one_pass needs a GPU, Triton and float weights: {missing}; leave one_pass out")
    return chosen(model, W)


def chosen(model: nn.Module, W: Tensor) -> SegmentBank:
    """Returns the bank of the trial's outcome, and logs it. A kernel that fails or is inexact is not used."""
    try:
        found = trial.trial(W, RANK)
    except Exception as e:  # compilers fail in ways of their own
        log.warning("one_pass: the kernel fails here (%s: %s); not used", type(e).__name__, str(e)[:200])
        return SegmentBank(model)
    off = max(t.off for t in found)
    rows = trial.won(found) if off <= EXACT * torch.finfo(W.dtype).eps else None
    shown = ", ".join(f"{t.rows}: {t.kernel / t.steps:.2f}" for t in found)
    use = f"used for {rows[0]} to {rows[1]} rows an adapter" if rows else "not used"
    log.info("one_pass: %s; seconds over those of two steps by rows: %s; error %.1e", use, shown, off)
    return one_pass_bank(model, rows) if rows else SegmentBank(model)


def _typical(model: nn.Module) -> Any:
    """Returns the weight of the linear layers' most common shape by numbers, or None."""
    layers = [m.weight for m in model.modules() if type(m) is nn.Linear]
    sizes: Counter[torch.Size] = Counter()
    for W in layers:
        sizes[W.shape] += W.numel()
    return next((W for W in layers if W.shape == sizes.most_common(1)[0][0]), None)
