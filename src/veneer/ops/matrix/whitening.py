"""The best low-rank matrix in a metric of inputs and outputs, by one eigendecomposition on the smaller side.

For y = W x with inputs of second moment C = E[x x'] and outputs weighed by R, the loss of W^ is tr(R D C D'),
D = W - W^. With C = L L' and R = Q Q' it is the squared Frobenius norm of Q' D L, so that the singular value
decomposition of Q' W L = U S V' gives the optimum of every rank at once (Eckart & Young), and cutting to rank
r loses the sum of S_i^2 over i > r. Neither is made: the eigenvectors of Q' W C W' Q (out, out) or of L' W' R
W L (in, in), whichever is smaller, are U or V, and W^ = Q'^-1 U U' Q' W = W L V V' L^-1.

R = 1: SVD-LLM (https://arxiv.org/abs/2403.07378), LoRD (https://arxiv.org/abs/2309.14021), Swift-SVD; C = 1
too: plain SVD. R of the loss's gradients: KFAC-SVD of LEMS (ICML 2026), with the transpose that its release
leaves out. Where x^ comes in place of x, W^ approximates W x by W^ x^: W is replaced by W E[x x^'] C^-1
(reduced-rank regression).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from veneer.ops.matrix.linalg import symmetric, symmetric_product


class Parts(NamedTuple):
    """A (k, in), B (out, k) and S (k,), largest first: B[:, :r] A[:r] is the optimum of rank r for every r.

    k = min(out, in). B A is W. Cutting to rank r loses the sum of S[r:]^2 in the metric.
    """

    A: Tensor
    B: Tensor
    S: Tensor

    def cut(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns A (rank, in) and B (out, rank), each row of A as long as its column of B."""
        A, B = self.A[:rank], self.B[:, :rank]
        tiny = torch.finfo(A.dtype).tiny
        ratio = (B.norm(dim=0) / A.norm(dim=1).clamp_min(tiny)).clamp_min(tiny).sqrt()
        return A * ratio[:, None], B / ratio

    def losses(self) -> Tensor:
        """Returns what cutting to each rank loses: (k + 1,), of rank 0 first."""
        squares = self.S.square()
        return torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])


def decompose(
    W: Tensor, C: Tensor | None = None, R: Tensor | None = None, cross: Tensor | None = None
) -> Parts:
    """Returns the parts of W (out, in) in the metric of C (in, in) and R (out, out), in float64.

    C and R must be positive definite; None stands for the identity. cross: E[x x^'] (in, in), where C is that
    of x^.
    """
    W, C, R = W.double(), _double(C), _double(R)
    if cross is not None:
        assert C is not None
        W = torch.cholesky_solve((W @ cross.double()).mT, torch.linalg.cholesky(C)).mT
    return _by_outputs(W, C, R) if W.shape[0] <= W.shape[1] else _by_inputs(W, C, R)


def _by_outputs(W: Tensor, C: Tensor | None, R: Tensor | None) -> Parts:
    Q = None if R is None else torch.linalg.cholesky(R)
    K = W if Q is None else Q.mT @ W
    G = symmetric_product(K if C is None else K @ C, K)
    U, S = _leading_first(G)
    B = U if Q is None else torch.linalg.solve_triangular(Q.mT, U, upper=True)
    return Parts(U.mT @ K, B, S)


def _by_inputs(W: Tensor, C: Tensor | None, R: Tensor | None) -> Parts:
    L = None if C is None else torch.linalg.cholesky(C)
    K = (W if L is None else W @ L).mT
    V, S = _leading_first(symmetric_product(K if R is None else K @ R, K))
    A = V.mT if L is None else torch.linalg.solve_triangular(L.mT, V, upper=True).mT
    return Parts(A, K.mT @ V, S)


def _leading_first(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of symmetric G as columns, and the roots of its eigenvalues, largest first."""
    w, Q = symmetric(G)
    return Q.flip(-1), w.clamp_min(0).sqrt().flip(-1)


def _double(M: Tensor | None) -> Tensor | None:
    return None if M is None else M.double()


def regularised(M: Tensor, share: float) -> Tensor:
    """Returns M (n, n) in float64 with `share` of its mean diagonal added to the diagonal; the identity for M
    = 0.
    """
    M = (M.double() + M.double().mT) / 2
    mean = M.diagonal().mean()
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    return M + share * mean * eye if mean > 0 else eye
