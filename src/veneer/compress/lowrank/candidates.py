"""The singular directions of a layer in a metric, best first, with what keeping so many of them is predicted
to cost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.ops.matrix.whitening import Parts
from veneer.sites import Site
from veneer.sites.factored.layers import Factored, holding


class Candidate(NamedTuple):
    """A (k, in), B (out, k) and losses (k + 1,): B[:, :r] A[:r] stands for W at the loss losses[r].

    mean: of the inputs (in,), where a bias takes the mean's part; None without. anchor: the mean that
    compressed
    layers give, where it differs.

    """

    A: Tensor
    B: Tensor
    losses: Tensor
    mean: Tensor | None = None
    anchor: Tensor | None = None

    @classmethod
    def of(cls, parts: Parts, scores: Tensor, mean: Tensor | None, dtype: torch.dtype) -> Candidate:
        """Returns the parts in the order of their scores (k,), the loss of leaving each out, as tensors of
        dtype.
        """
        order = scores.argsort(descending=True, stable=True)
        A, B = Parts(parts.A[order], parts.B[:, order], scores[order]).cut(len(order))
        tail = scores[order].flip(0).cumsum(0).flip(0)
        losses = torch.cat([tail, tail.new_zeros(1)])
        return cls(A.to(dtype), B.to(dtype), losses, None if mean is None else mean.to(dtype))

    def layer(self, site: Site, rank: int, form: str) -> Factored:
        """Returns the layer of this rank and form for the site, with the site's bias and the mean's part."""
        W, A, B = site.weight().detach(), self.A[:rank], self.B[:, :rank]
        bias = getattr(site.module, "bias", None)
        own = None if bias is None else bias.detach()
        if self.mean is not None:
            there = self.mean if self.anchor is None else self.anchor
            moved = W.double() @ self.mean.double() - B.double() @ (A.double() @ there.double())
            own = (moved if own is None else moved + own.double()).to(W.dtype)
        made = holding(form, A.to(W.dtype), B.to(W.dtype), own)
        made.transposed = site.kind == "transposed"
        made.added_bias = bias is None and own is not None
        return made.train(site.module.training)


def tensors(found: Mapping[str, Iterable[Candidate]]) -> dict[str, Tensor]:
    """Returns the candidates of every layer under names like "mlp.up_proj|0|A"."""
    named = {
        f"{name}|{j}|{key}": t
        for name, some in found.items()
        for j, candidate in enumerate(some)
        for key, t in candidate._asdict().items()
        if t is not None
    }
    return {n: t.contiguous() for n, t in named.items()}


def candidates(found: Mapping[str, Tensor], name: str) -> list[Candidate]:
    """Returns the candidates of one layer from such tensors."""
    rows: dict[int, dict[str, Tensor]] = {}
    for key, t in found.items():
        owner, _, rest = key.partition("|")
        if owner == name and "|" in rest:
            j, _, part = rest.partition("|")
            rows.setdefault(int(j), {})[part] = t
    return [Candidate(**rows[j]) for j in sorted(rows)]


def biased(layer: nn.Module) -> bool:
    """Returns True if a layer has a bias of its own."""
    return getattr(layer, "bias", None) is not None
