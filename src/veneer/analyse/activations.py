"""Compares hidden states of a base and of the tuned model: linear CKA, Procrustes and Gram distances.

Kornblith et al. 2019, https://arxiv.org/abs/1905.00414; Schoenemann 1966. PEFT-Arena 2026,
https://arxiv.org/abs/2605.28819, finds both to go with forgetting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.sites.blocks import stack


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """Returns the linear centred kernel alignment of X (n, d) and Y (n, d): 1 up to rotation and scale."""
    X, Y = _centred(X), _centred(Y)
    cross = torch.linalg.matrix_norm(Y.mT @ X) ** 2
    return float(cross / (torch.linalg.matrix_norm(X.mT @ X) * torch.linalg.matrix_norm(Y.mT @ Y)))


def procrustes(X: Tensor, Y: Tensor) -> float:
    """Returns min over rotations R of ||Y R - X|| / ||X||, both (n, d) and centred."""
    X, Y = _centred(X), _centred(Y)
    nuclear = torch.linalg.svdvals(Y.mT @ X).sum()
    squared = X.square().sum() + Y.square().sum() - 2 * nuclear
    return float(squared.clamp_min(0).sqrt() / X.norm())


def gram_distortion(X: Tensor, Y: Tensor) -> float:
    """Returns ||C(Y) - C(X)||_F / ||C(X)||_F, C (n, n) the cosines of rows; X (n, d), Y (n, d)."""
    before, after = (nn.functional.normalize(M.double(), dim=1) for M in (X, Y))
    whole = before @ before.mT
    return float((after @ after.mT - whole).norm() / whole.norm())


def _centred(X: Tensor) -> Tensor:
    return X.double() - X.double().mean(0)


@torch.no_grad()
def hidden_states(model: nn.Module, body: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Returns the output of the model's middle block for one batch: (b * t, d), padding included."""
    layers = stack(body)
    assert layers is not None, "a model without blocks has no middle one"
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        kept.append((out[0] if isinstance(out, tuple) else out).detach())

    handle = layers[len(layers) // 2].register_forward_hook(keep)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return kept[0].flatten(0, -2)
