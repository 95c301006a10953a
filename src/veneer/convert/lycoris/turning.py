"""diag-OFT of LyCORIS: W'_k = R_k' W_k for blocks of output rows, R = (I + Q) (I - Q)^-1, Q = P - P'.

It turns outputs and PEFT's OFT inputs, so the change is kept as a dense one of its base.
https://github.com/KohakuBlueleaf/LyCORIS
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.convert import tensor_files
from veneer.convert.base import of_model
from veneer.convert.dialects import kohya
from veneer.errors import FormatError, first_few
from veneer.sites import site_for

BLOCKS = "oft_blocks"
KNOWN = (BLOCKS, "alpha", "rescale")


def holds(file: Path) -> bool:
    """Returns True for a file with blocks of diag-OFT or BOFT."""
    return any(name.endswith(f".{BLOCKS}") for name in tensor_files.keys(file))


@torch.no_grad()
def to_changes(model: nn.Module, file: Path) -> Changes:
    """Returns the changes of the model's layers, not attached.

    Raises FormatError for BOFT, for blocks that do not fit, and for a constraint of the turning.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, t in tensor_files.tensors(file).items():
        flat, _, end = name.rpartition(".")
        modules.setdefault(flat, {})[end] = t
    odd = [f"{flat}.{end}" for flat, own in modules.items() for end in own if end not in KNOWN]
    if odd:
        raise FormatError(f"{file} holds other tensors than those of diag-OFT: {first_few(odd)}")
    names = kohya.resolve(modules, of_model(model).names)
    changes: Changes = []
    for flat, own in modules.items():
        site = site_for(names[flat], model.get_submodule(names[flat]))
        delta = methods.build(methods.get("dense"), site, {})
        delta.get_parameter("D").copy_(_change(names[flat], site.weight().detach().double(), own))
        changes.append((site, delta))
    return changes


def _change(name: str, W: Tensor, own: dict[str, Tensor]) -> Tensor:
    P = own[BLOCKS].double()
    if P.ndim != 3:
        raise FormatError(f"{name}: {BLOCKS} {tuple(P.shape)} are of BOFT, which is not read; merge it there")
    n, b, _ = P.shape
    if P.shape[1] != P.shape[2] or n * b != len(W):
        raise FormatError(f"{name}: {BLOCKS} {tuple(P.shape)} do not turn {len(W)} output rows")
    if float(own.get("alpha", torch.zeros(()))):
        raise FormatError(f"{name}: its turning was constrained (alpha), which is not read; merge it there")
    Q, eye = P - P.mT, torch.eye(b, dtype=P.dtype)
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    turned: Tensor = (R.mT @ W.unflatten(0, (n, b))).flatten(0, 1)
    if "rescale" in own:
        turned = own["rescale"].double().reshape(-1, 1) * turned
    return turned - W
