"""A factored layer as a site: a method adapts W as any other, and a merge adds the change to the factors."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.ops.matrix.truncate import truncate
from veneer.sites.base import Site
from veneer.sites.factored.layers import Factored


class FactoredSite(Site):
    """W = B A. Writing W keeps the factors and appends those of the change, so that the rank grows by the
    change's rank.

    A change that came from a product has that product's rank; smaller singular values than rounding makes are
    dropped. Where the sum would have full rank, W itself is factored anew. A merged low-rank adapter is
    rounded as a product of its own, which loses less of it than rounding W + B A would.
    """

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.out, self.in_ = (
            self.module.out_features,
            self.module.in_features,
        )  # W itself is not multiplied for it

    def weight(self) -> Tensor:
        W: Tensor = self.module.weight
        return W

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.module.device  # type: ignore[no-any-return]

    def apply(self, x: Tensor, M: Tensor) -> Tensor:
        return x @ M.mT

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p)

    @torch.no_grad()
    def stored(self, W: Tensor) -> Tensor:
        """W (out, in) as the factors would hold it, in W's dtype."""
        twin = copy.copy(self.module)
        for own in ("_modules", "_buffers", "_parameters"):
            setattr(twin, own, dict(getattr(self.module, own)))
        twin.become(*self._summed(W))
        kept: Tensor = twin.weight.to(W.dtype)
        return kept

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        """Writes W (out, in) into the factors, in their dtype or format."""
        self.module.become(*self._summed(W))

    def _summed(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A (r', in) and B (out, r') of W: the layer's own with those of W's difference appended."""
        A, B = self.module.factors()
        change = W.to(A.dtype) - B @ A
        scale = float(torch.linalg.vector_norm(W, dtype=torch.float64))
        noise = 4 * torch.finfo(A.dtype).eps * scale
        if float(change.norm()) <= noise:
            return A, B
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        r = int((S > noise).sum())
        if len(A) + r >= min(W.shape):
            whole = truncate(W.to(A.dtype), min(W.shape))
            return whole.A, whole.B
        root = S[:r].sqrt()
        return torch.cat([A, root[:, None] * Vh[:r]]), torch.cat([B, U[:, :r] * root], 1)


def factored_forms(model: nn.Module) -> dict[str, str]:
    """Returns the form of every factored layer, "plain" or "pivoted", by the layer's name; {} for other
    models.
    """
    return {n: m.form for n, m in model.named_modules() if isinstance(m, Factored)}
