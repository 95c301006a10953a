"""Times PiSSA's start and measures its residual: Veneer and PEFT (torch.svd_lowrank, 16 iterations).

The peer draws from PyTorch's generator: its residual is the median of five draws. Two spectra, a power law
and one with four outliers over a slowly falling bulk; each figure is the worse of the two.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import _measure as m
import torch
from torch import Tensor

from veneer.ops.matrix.linalg import leading_svd

D, NITER = 2048, 16


def matrix(spectrum: Tensor, seed: int = 0) -> Tensor:
    """Returns a float32 matrix with these singular values and random directions."""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(D, D, generator=draw))[0] for _ in range(2))
    return U * spectrum @ V.mT


def spectra() -> dict[str, Tensor]:
    """Singular values by name, largest first."""
    k = torch.arange(1, D + 1, dtype=torch.float32)
    return {"power law": k**-0.5, "outliers": torch.cat([10 * 0.6 ** k[:4], k[4:] ** -0.3])}


def excess(W: Tensor, low: Tensor, best: Tensor) -> float:
    """Returns the relative excess of the residual over the best one."""
    return float((W.double() - low.double()).norm() / best - 1)


def drawn(make: Callable[[], Tensor], seed: int) -> Tensor:
    """Returns one outcome of a decomposition whose draws come from PyTorch's own generator."""
    torch.manual_seed(seed)
    return make()


def main() -> None:
    times, excesses = [], []
    for name, spectrum in spectra().items():
        W = matrix(spectrum)
        best = torch.linalg.svdvals(W.double())[m.RANK :].norm()

        def ours(W: Tensor = W) -> Tensor:
            U, S, Vh = leading_svd(W, m.RANK, torch.Generator().manual_seed(1))
            return U * S @ Vh

        def peer(W: Tensor = W) -> Tensor:
            U, S, V = torch.svd_lowrank(W, m.RANK, niter=NITER)
            return U * S @ V.mT

        seconds = m.interleaved({"ours": ours, "peer": peer})
        both = excess(W, ours(), best), statistics.median(excess(W, drawn(peer, s), best) for s in range(5))
        print(
            name,
            {k: f"{1000 * v:.0f} ms" for k, v in seconds.items()},
            "excess",
            *(f"{e:.2g}" for e in both),
            file=sys.stderr,
        )
        times.append(seconds["peer"] / seconds["ours"])
        excesses.append(both[0] / both[1])
    m.report("init", {"pissa_time_ratio": min(times), "pissa_excess_ratio": max(excesses)})


if __name__ == "__main__":
    main()
