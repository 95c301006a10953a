"""LoKr: W' = W + s kron(L, R), L (p, m), R (k, n), out = p k, in = m n.  Yeh et al. 2023,
https://arxiv.org/abs/2309.14859

Every block of the change is a multiple of one matrix R, with the numbers of L as multiples. R = B A of rank
r, or a whole matrix if that has fewer numbers; with `both`, L = Lb La too. kron(L, R) x is L X R' for x as a
matrix X (m, n), so the change is never built. s = alpha / r.

Parameters: p m + r (k + n) a layer: with a factor near the root of the width about r times the width.
State: L and R, or their factors.
Cost: products of the input with R and L, less than a LoRA of the same size; merged: none.
Use: small files of image models (LyCORIS); the change has full rank if R is whole.
Against: one R for all blocks is a strong assumption, and the order of inputs and outputs decides what a block
is. A whole R cannot become plain LoRA.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError, FormatError
from veneer.methods.base.checks import check_rank, scaling_of
from veneer.methods.base.delta import Delta, master_dtype
from veneer.methods.base.factors import ROWWISE, Factors
from veneer.methods.base.options import build
from veneer.methods.base.peft import (
    PeftForm,
    PeftStored,
    check_peft_tensors,
    peft_core,
    peft_dense_map,
    peft_flat,
)
from veneer.ops.draws import keyed
from veneer.sites import Site

PEFT_NAMES = {"L": "lokr_w1", "Lb": "lokr_w1_a", "La": "lokr_w1_b"}
PEFT_NAMES |= {"R": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}


class Shape(NamedTuple):
    """out = p k, in = m n."""

    p: int
    k: int
    m: int
    n: int


@final
class LoKr(Delta, PeftStored):
    """L (p, m) and A (r, n) drawn uniformly as in LyCORIS, B (k, r) or a whole R (k, n) zero."""

    roles = {"L": "factor", "Lb": "factor", "La": "factor", "R": "factor", "A": "A", "B": "B"}
    peft_settings = {
        "r": 8,
        "alpha": 8,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "decompose_both": False,
        "decompose_factor": -1,
        "rank_dropout_scale": False,
        "init_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        factor: int = -1,
        both: bool = False,
        seed: int = 0,
    ) -> None:
        """
        rank: r, at most min(out, in)
        alpha: s = alpha / r (default: s = 1)
        factor: p and m if it divides, else at most this; -1 for the divisors nearest the root of each side
        both: L as a product of rank r too, if that is smaller
        seed: key of the random draws, together with the layer's name
        """
        super().__init__()
        check_rank(rank, site)
        if factor < 1 and factor != -1:
            raise ConfigError(f"factor must be at least 1, or -1, got {factor}")
        self.scale, self.shape = scaling_of(alpha, rank, default=1.0), shape_of(site, factor)
        p, k, m, n = self.shape
        draw, like = keyed(seed, site.key), torch.empty((), dtype=master_dtype(site), device=site.device)

        def uniform(rows: int, columns: int) -> nn.Parameter:
            t = (2 * torch.rand(rows, columns, generator=draw) - 1) / math.sqrt(columns)
            return nn.Parameter(t.to(like))

        if both and rank < max(p, m) / 2:
            self.Lb, self.La = uniform(p, rank), uniform(rank, m)
        else:
            self.L = uniform(p, m)
        if rank < max(k, n // _kernel(site)) / 2:
            self.A, self.B = uniform(rank, n), nn.Parameter(like.new_zeros(k, rank))
        else:
            self.R = nn.Parameter(like.new_zeros(k, n))

    def left(self) -> Tensor:
        """Returns L (p, m)."""
        return self.L if "L" in self._parameters else self.Lb @ self.La

    def right(self) -> Tensor:
        """Returns R (k, n)."""
        return self.R if "R" in self._parameters else self.B @ self.A

    def factors(self, site: Site) -> Factors | None:
        """Returns factors of rank min(p, m) r if R is a product; they repeat it, so forward() does
        without."""
        if "R" in self._parameters:
            return None
        L, (p, _, m, _) = self.scale * self.left(), self.shape
        if m <= p:
            return Factors(torch.kron(_eye(m, L), self.A), torch.kron(L, self.B))
        return Factors(torch.kron(L, self.A), torch.kron(_eye(p, L), self.B))

    def delta(self, site: Site) -> Tensor:
        return torch.kron(self.scale * self.left(), self.right())

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.kind not in ROWWISE:
            return site.apply(self.dropped(x, y, site), self.delta(site).to(y.dtype))
        X, L = x.to(y.dtype).unflatten(-1, (self.shape.m, self.shape.n)), self.scale * self.left()
        steps = [self.R] if "R" in self._parameters else [self.A, self.B]
        first, *rest = (t.to(y.dtype).mT for t in steps)
        H = L.to(y.dtype) @ (X @ first)  # (.., p, k), or (.., p, r) before the last step
        for step in rest:
            H = H @ step
        change: Tensor = H.flatten(-2)
        return change

    def to_peft(self, site: Site) -> PeftForm | None:
        if not peft_dense_map(site) or (site.spatial == 1 and "R" in self._parameters):
            return None  # PEFT 0.21 lays out the product with a whole R of a Conv1d in another order
        given = self.options
        config = {
            "peft_type": "LOKR",
            "r": given["rank"],
            "alpha": self.scale * given["rank"],
            "decompose_both": given["both"],
            "decompose_factor": given["factor"],
        }
        tensors = {PEFT_NAMES[name]: p.detach() for name, p in self.named_parameters()}
        if site.kind == "conv" and "lokr_w2" in tensors:
            tensors["lokr_w2"] = tensors["lokr_w2"].unflatten(1, (-1, *site.module.kernel_size))
        return PeftForm(config, tensors)

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "LOKR"

    @classmethod
    def from_peft(cls, site: Site, config: dict[str, Any], tensors: dict[str, Tensor]) -> Delta:
        if "lokr_t2" in tensors:
            _, k, _, n = shape_of(site, config["decompose_factor"])
            names = ("lokr_t2", "lokr_w2_a", "lokr_w2_b")
            tensors |= peft_core(site, tensors, names, (config["r"], k, n))
        if "lokr_w2" in tensors and site.spatial == 1:
            raise FormatError(
                f"{site.name}: PEFT 0.21 lays out LoKr with a whole second factor of a Conv1d in another"
                f" order, which is"
                f" not LoKr's product; convert the adapter with PEFT's own merge"
            )
        if "lokr_w2" in tensors:
            tensors |= {"lokr_w2": peft_flat(tensors["lokr_w2"])}
        options = {"rank": config["r"], "alpha": float(config["alpha"])}
        options |= {"factor": config["decompose_factor"], "both": config["decompose_both"]}
        delta = build(cls, site, options)
        shapes = {PEFT_NAMES[name]: tuple(p.shape) for name, p in delta.named_parameters()}
        check_peft_tensors(site, tensors, shapes)
        with torch.no_grad():
            for name, p in delta.named_parameters():
                p.copy_(tensors[PEFT_NAMES[name]])
        return delta


def shape_of(site: Site, factor: int) -> Shape:
    """Returns the sides of L and R: PEFT's rule. A convolution's kernel belongs to n."""
    kernel = _kernel(site)
    (p, k), (m, n) = split(site.out, factor), split(site.in_ // kernel, factor)
    return Shape(p, k, m, n * kernel)


def _kernel(site: Site) -> int:
    return math.prod(site.module.kernel_size) if site.kind == "conv" else 1


def split(size: int, factor: int) -> tuple[int, int]:
    """Returns `factor` and its cofactor if it divides, else the most even pair whose smaller number is at
    most it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    smaller = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= most)
    return smaller, size // smaller


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
