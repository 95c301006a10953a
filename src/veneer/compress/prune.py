"""Unstructured pruning, to compare low rank with: the smallest numbers of every row or layer become zeros.

magnitude: |W|, over the whole layer. wanda: |W| times the norm of the input it meets, row by row (Sun et al.
2023,
https://arxiv.org/abs/2306.11695), by the inputs of the original model. The layers stay dense and as fast as
they were;
kept as numbers and a mask of one bit each, a share s of zeros takes 1 - s + 1/16 of the bytes of a bfloat16
layer.

"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veneer.compress.lowrank.moments import Watch
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.walk import Batch
from veneer.errors import ConfigError, suggest
from veneer.sites.finding.names import Target

WAYS = ("magnitude", "wanda")
MASK = 1 / 16  # a bit for every number of 16


@torch.no_grad()
def prune(
    model: nn.Module,
    way: str,
    *,
    sparsity: float,
    data: Sequence[Batch] = (),
    to: Target = "all-linear",
    exclude: Target = (),
) -> nn.Module:
    """Returns the same model with a share of zeros in every linear layer of its blocks.

    data: batches as of veneer.compress, for wanda. Raises ConfigError and SiteError before anything is
    changed.

    """
    if way not in WAYS:
        raise ConfigError(f"unknown way {way!r} of pruning{suggest(way, WAYS)}")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity must be at least 0 and below 1, got {sparsity}")
    if way == "wanda" and not data:
        raise ConfigError("data: wanda needs batches; give some, or use magnitude")
    source = Held(model, to, exclude)
    norms = _norms(source, data) if way == "wanda" else {}
    for name, block in zip(source.walk.names, source.walk.blocks, strict=True):
        for n, site in source.sites(source.walk.names.index(name), block).items():
            W = site.weight().detach()
            scores = W.float().abs()
            if way == "wanda":
                scores = scores * norms[f"{name}.{n}"].to(scores)
            site.set_weight(torch.where(_kept(scores, sparsity, by_row=way == "wanda"), W, 0))
    return model


def _kept(scores: Tensor, sparsity: float, *, by_row: bool) -> Tensor:
    """True for the largest scores (out, in) of every row, or of all."""
    flat = scores if by_row else scores.reshape(1, -1)
    gone = int(sparsity * flat.shape[1])
    order = flat.argsort(dim=1, stable=True)
    kept = torch.ones_like(flat, dtype=torch.bool).scatter_(1, order[:, :gone], False)
    return kept.view_as(scores)


def _norms(source: Held, data: Sequence[Batch]) -> dict[str, Tensor]:
    """The root mean square of every layer's inputs (in,), by the layer's name."""
    entered = [source.walk.enter(b) for b in data]
    hidden = [e.hidden for e in entered]
    found: dict[str, Tensor] = {}
    for i, name in enumerate(source.walk.names):
        with source.block(i) as block:
            watch = Watch(source.sites(i, block))
            made = []
            for e, x in zip(entered, hidden, strict=True):
                with watch.over(e.mask):
                    made.append(e.run(i, block, x))
            hidden = made
        found |= {f"{name}.{n}": m.moment().diagonal().sqrt() for n, m in watch.inputs.items()}
    return found
