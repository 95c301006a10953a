"""Keeps a change of one matrix in the smallest layout that loses nothing: factors, sparse or dense."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.store.manifest import method_of
from veneer.methods import Delta
from veneer.methods.base.biased import Biased
from veneer.methods.lora import LoRA
from veneer.methods.shira import SHiRA
from veneer.ops.draws import keyed
from veneer.ops.matrix.truncate import truncate_product
from veneer.sites import Site

# Largest relative residual of factors, by the precision of the change.
LOST = {torch.float64: 1e-10, torch.float32: 1e-6}
LAYOUTS = {"lora": "as factors", "shira": "sparse", "dense": "dense", "bitfit": "as biases", "full": "whole"}
SPARSE = 3  # numbers of float32 that one number of a sparse change takes, with its place


@torch.no_grad()
def holding(site: Site, D: Tensor) -> Delta:
    """Returns the change D (out, in) of the site as a delta: LoRA, SHiRA or Dense, whichever is smallest."""
    n_set = int(D.count_nonzero())
    most = min(SPARSE * n_set, D.numel())  # numbers that factors may take
    pair = factors(D, (most - 1) // sum(D.shape))
    if pair is not None:
        return LoRA.holding(site, *pair, alpha=len(pair[0]))
    if SPARSE * n_set < D.numel():
        places = D.flatten().nonzero()[:, 0]
        return SHiRA.holding(site, places, D.flatten()[places])
    delta = methods.build(methods.get("dense"), site, {})
    delta.get_parameter("D").copy_(D)
    return delta


def factors(D: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Returns A (r, in), B (out, r) with B A = D to rounding and r <= most, or None if D has a higher rank.

    A random sketch of doubling width finds the range, so a low rank is found without a decomposition of D.
    """
    norm, width = float(D.norm()), 8
    if not norm:
        return D.new_zeros(1, D.shape[1]), D.new_zeros(D.shape[0], 1)
    while most:
        width = min(width, *D.shape)
        Q = torch.linalg.qr(D @ torch.randn(D.shape[1], width, generator=keyed(0, "range")).to(D)).Q
        A = Q.mT @ D
        if float((D - Q @ A).norm()) <= LOST[D.dtype] * norm:
            found = truncate_product(Q, A)
            return (found.A, found.B) if len(found.A) <= most else None
        if width >= min(most, *D.shape):
            return None
        width *= 2
    return None


def described(found: Changes) -> list[str]:
    """Returns a sentence for each layout of the changes."""
    kinds = Counter(method_of(delta) for _, delta in found)
    return [f"{n} layers are kept {LAYOUTS[kind]}" for kind, n in kinds.items()]


@torch.no_grad()
def ranks(found: Changes) -> list[int]:
    """Returns the ranks of the changes that are products of two factors, rising."""
    forms = [delta.factors(site) for site, delta in found]
    return sorted({len(f.A) for f in forms if f is not None and f.is_product})


@torch.no_grad()
def with_bias(site: Site, delta: Delta, b: Tensor) -> Delta:
    """Returns the delta with the change b (out,) of the layer's bias."""
    return Biased(site, delta, b)
