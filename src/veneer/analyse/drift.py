"""Drift of each layer's output by its change, on the base's own inputs (PEFT-Arena 2026, arXiv 2605.28819).

relative = sum ||D h||^2 / sum ||W h||^2, and unit = sum ||D h||^2 / (||D||_F^2 sum ||h||^2): the share of the
change that meets the inputs, whatever its size. D h comes from factors where there are factors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapt.switch import using
from veneer.analyse.profiles import Matrix, matrices


@dataclass(frozen=True)
class Drift:
    """The drift of one matrix; 0 where nothing changed."""

    site: str
    relative: float
    unit: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values."""
        return asdict(self)


@torch.no_grad()
def drift(model: nn.Module, name: str, inputs: Mapping[str, Any]) -> list[Drift]:
    """Returns the drift of every linear layer that adapter `name` changes, for one batch, in model order."""
    linear = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linear |= {n.removesuffix(".weight"): m for n, m in linear.items()}
    found = [m for m in matrices(model, name) if m.name in linear]
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack, using(model):
        for matrix in found:
            hook = linear[matrix.name].register_forward_pre_hook(_keep(kept, matrix.name))
            stack.callback(hook.remove)
        model(**inputs)
    return [_drift(matrix, kept[matrix.name]) for matrix in found if matrix.name in kept]


def _keep(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def keep(module: nn.Module, args: Any) -> None:
        kept[name] = args[0].detach().flatten(0, -2).to(torch.float32).mT  # (in, tokens)

    return keep


def _drift(matrix: Matrix, h: Tensor) -> Drift:
    moved = float(matrix.times(h.to(matrix.W)).double().square().sum())
    own = float((matrix.W @ h.to(matrix.W)).double().square().sum())
    size = matrix.norm() ** 2 * float(h.double().square().sum())
    return Drift(matrix.name, moved / own if own else 0.0, moved / size if size else 0.0)
