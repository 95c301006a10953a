"""Low-rank linear algebra: truncated decompositions, spectra of products, row norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.errors import ShapeError

SCIPY_FROM = 512  # smaller ones do not pay for the import
MORE = 4  # iterations of a sketch at most, beyond those asked for
EXCESS = 1e-4  # of a sketch's residual over the best one, relative
NOISE = 2**-9  # relative rounding of bfloat16


def multiplies_bf16(where: torch.device) -> bool:
    """Returns True if the device has instructions for products of bfloat16 matrices."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # older versions of torch cannot say
    ask: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = ask()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def precise(W: Tensor) -> Tensor:
    """Returns W in float32, or float64 if it already is: the precision of decompositions."""
    return W if W.dtype == torch.float64 else W.float()


def symmetric(M: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (n,), smallest first, and eigenvectors (n, n) as columns of symmetric M (n, n).

    On a CPU by SciPy where it is installed: with the same algorithm (divide and conquer) it takes 0.6 of
    torch's time at n = 512 to 4096.
    """
    if M.device.type == "cpu" and len(M) >= SCIPY_FROM:
        try:
            from scipy.linalg import eigh
        except ImportError:
            pass
        else:
            w, Q = eigh(M.detach().numpy(), driver="evd")
            return torch.from_numpy(w), torch.from_numpy(Q)
    w, Q = torch.linalg.eigh(M)
    return w, Q


def symmetric_product(P: Tensor, Q: Tensor, parts: int = 4) -> Tensor:
    """Returns P Q' (n, n), known to be symmetric, of P and Q (n, k): 5/8 of the products at four parts.

    The blocks below the diagonal are computed and mirrored.
    """
    n = len(P)
    step = max(1, -(-n // parts))
    G = P.new_zeros(n, n)
    for at in range(0, n, step):
        G[at:, at : at + step] = P[at:] @ Q[at : at + step].mT
    return G.tril() + G.tril(-1).mT


def check_rank(rank: int, W: Tensor, where: str = "") -> None:
    """Raises ShapeError unless 1 <= rank <= min(out, in)."""
    check_at_most(rank, min(W.shape), "min(out, in)", where)


def check_at_most(rank: int, most: int, what: str, where: str = "", name: str = "rank") -> None:
    """Raises ShapeError unless `rank`, called `name`, is an integer from 1 to `most`, called `what`."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ShapeError(f"{name} must be an integer >= 1, got {rank!r}")
    at = f" at {where!r}" if where else ""
    if rank < 1:
        raise ShapeError(f"{name} must be >= 1, got {rank}{at}")
    if rank > most:
        raise ShapeError(f"{name} {rank} > {what} = {most}{at}; use at most {most} or exclude the layer")


def range_finder(W: Tensor, sketch: Tensor, iterations: int, rank: int) -> Tensor:
    """Returns orthonormal Q (out, width) that nearly spans W's leading `rank` directions, at least float32.

    W: (out, in), sketch: (in, width) random. Subspace iteration with a QR at every step (Halko, Martinsson &
    Tropp 2011, algorithm 4.4, which has one at every half step too). Where the machine multiplies bfloat16
    matrices, these products are such: the part of a column that rounding removes is a small direction like
    any other to the next iteration. Where W's own rounding would hide the wanted directions, they are in
    float32. Iterations go on, beyond those asked for, until the residual should be within `EXCESS` of the
    best one.
    """
    exact, M = precise(W), _narrow(W)
    Q, sizes = _orthonormal(M @ sketch.to(M))
    for _ in range(iterations):
        Q, sizes = _orthonormal(M @ (M.mT @ Q.to(M)))
    if W.is_meta:  # of a model in outline: shapes without numbers
        return Q
    if M.dtype != exact.dtype and _hidden(W, sizes, rank):
        M = exact
        for _ in range(iterations):
            Q, sizes = _orthonormal(M @ (M.mT @ Q))
    for _ in range(_more(sizes, rank, iterations)):
        Q, _ = _orthonormal(M @ (M.mT @ Q.to(M)))
    return Q


def _narrow(W: Tensor) -> Tensor:
    return W.to(torch.bfloat16) if W.dtype != torch.float64 and multiplies_bf16(W.device) else precise(W)


def _orthonormal(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns an orthonormal basis of Y's columns, and the sizes of their new parts, largest first."""
    Q, R = torch.linalg.qr(precise(Y))
    return Q, R.diagonal(dim1=-2, dim2=-1).abs().sort(descending=True).values


def _hidden(W: Tensor, squares: Tensor, rank: int) -> bool:
    """Tells if rounding W to bfloat16 may hide its direction number `rank`.

    squares: nearly the squared singular values. Rounding adds a matrix of independent numbers, whose norm is
    at most about (1/sqrt(out) + 1/sqrt(in)) of its Frobenius norm.
    """
    spread = sum(1 / math.sqrt(n) for n in W.shape)
    norm = torch.linalg.vector_norm(W, dtype=torch.float32)  # in float64 it takes 30 times as long
    added = NOISE * spread * float(norm)
    return added > 0.3 * float(squares[rank - 1].sqrt())


def _more(squares: Tensor, rank: int, done: int) -> int:
    """Returns the iterations that are missing for a residual within `EXCESS`.

    An iteration makes the part of a foreign direction in Q smaller by (s_width / s_rank)^2, and its share of
    the residual by the square of that. The hundredth was measured on power laws of exponents 0.3 to 1.
    """
    ratio = float(squares[-1] / squares[rank - 1].clamp_min(1e-300))
    missing = 0
    while missing < MORE and 0.01 * ratio ** (2 * (done + missing) + 1) > EXCESS:
        missing += 1
    return missing


def leading_svd(
    W: Tensor, rank: int, draw: torch.Generator, iterations: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading triplets U (out, r), S (r,), Vh (r, in) of W, in at least float32.

    Randomised, with as many extra directions as the rank asks for (a sketch of 2 x rank + 8 columns), which
    on slowly falling spectra is what accuracy depends on; exact where that sketch would not be smaller than
    the matrix. Raises ShapeError if rank > min(out, in).
    """
    check_rank(rank, W)
    return _leading(W, rank, [draw], iterations)


def leading_svds(
    Ws: Sequence[Tensor], rank: int, draws: Sequence[torch.Generator]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns leading_svd of matrices of one shape, dtype and device as one stack. Raises ShapeError.

    The same numbers as one at a time up to rounding. It takes 6 bytes for every number of the matrices at
    once, 16 in float64.
    """
    check_rank(rank, Ws[0])
    U, S, Vh = _leading(torch.stack([precise(W) for W in Ws]), rank, draws, iterations=3)
    return list(zip(U, S, Vh, strict=True))


def _leading(
    W: Tensor, rank: int, draws: Sequence[torch.Generator], iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the triplets of W (out, in) with one draw, or of a stack W (n, out, in) with n."""
    out, in_ = W.shape[-2:]
    width = 2 * rank + 8
    if width >= min(out, in_):
        U, S, Vh = torch.linalg.svd(precise(W), full_matrices=False)
    else:
        # on the CPU: the same on every device
        drawn = torch.stack([torch.randn(in_, width, generator=d) for d in draws])
        ones, sketches = W.reshape(-1, out, in_), drawn.to(W.device)
        found = [range_finder(one, d, iterations, rank) for one, d in zip(ones, sketches, strict=True)]
        Q = torch.stack(found).view(*W.shape[:-2], out, width)
        B = Q.mT @ precise(W)
        U, S, Vh = torch.linalg.svd(B, full_matrices=False)
        U = Q @ U
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def norm_without(W: Tensor, B: Tensor, A: Tensor) -> float:
    """Returns ||W - B A|| / ||W|| by one thin product of W; 0 for W = 0.

    ||W - B A||^2 = ||W||^2 - 2 <W A', B> + ||B A||^2.

    Sums are in float64, so that shares above a thousandth are accurate.
    """
    whole = torch.linalg.vector_norm(W, dtype=torch.float64).square()
    cross = ((precise(W) @ precise(A).mT).double() * B.double()).sum()
    left: Tensor = (whole - 2 * cross + product_norm(B.double(), A.double()).square()) / whole
    return float(left.clamp_min(0).sqrt()) if whole else 0.0


def product_spectrum(B: Tensor, A: Tensor) -> Tensor:
    """Returns the singular values (r,) of B A, largest first, from B (out, r), A (r, in)."""
    RB = torch.linalg.qr(precise(B)).R
    RA = torch.linalg.qr(precise(A).mT).R
    spectrum: Tensor = torch.linalg.svdvals(RB @ RA.mT)
    return spectrum


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Returns the Frobenius norm of B A: sqrt(trace((B'B)(AA'))), without forming the product."""
    B, A = precise(B), precise(A)
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt()


def effective_rank(spectrum: Tensor) -> float:
    """Returns exp of the entropy of the normalised singular values (Roy & Vetterli 2007); 0 for zeros."""
    total = spectrum.sum()
    if total <= 0:
        return 0.0
    p = spectrum / total
    return float(torch.exp(-(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()))


def row_norms(W: Tensor) -> Tensor:
    """Returns the norm of every row (out,), summed in at least float32 without a copy of W."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=dtype)
    return norms


def row_norms_of_sum(W: Tensor, squares: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Returns row norms (out,) of W + B A, given the squared row norms of W (out, in).

    ||w + bA||^2 = ||w||^2 + 2 b (A w') + b (A A') b', so nothing of the size of W is made.
    """
    cross = (W @ A.to(W.dtype).mT).to(B.dtype)  # (out, r)
    inner: Tensor = 2 * cross + B @ (A @ A.mT)
    return (squares + (B * inner).sum(1)).clamp_min(0).sqrt()
