"""Starts that look at the loss, from a dense gradient G (out, in) in float64."""

import numpy as np


def best(G, k):
    """The nearest matrix of rank k (Eckart and Young)."""
    U, S, V = np.linalg.svd(G)
    return sum(S[i] * np.outer(U[:, i], V[i]) for i in range(min(k, len(S))))


def first_step(G, A, B, s):
    """Returns the first-order change of s B A in one descent step at rate 1.

    B moves along s G A', A along s B' G.
    """
    return -s * ((s * G @ A.T) @ A + B @ (s * B.T @ G))


def cosine(X, Y):
    return float(np.sum(X * Y) / np.linalg.norm(X) / np.linalg.norm(Y))


def loraga(G, r, gamma=16.0):
    """Wang, Yu & Li 2024, algorithm 1: A and B, up to the sign of every row and column."""
    U, _, V = np.linalg.svd(G)
    c = len(G) ** (1 / 4) / gamma ** (1 / 2)
    return c * V[:r], c * U[:, r : 2 * r]


def weight_from_kept(W, t, options):
    """W' = W + s (B A - B0 A0) at LoRA-GA's default scaling, that of rsLoRA with alpha 16."""
    s = 16 / options["rank"] ** 0.5
    start = t["B0"] @ t["A0"] if "A0" in t else 0.0
    return W + s * (t["B"] @ t["A"] - start)


def gora(G, A, s, gamma=0.05):
    """He et al. 2025: B0 from the projection of -G on A's rows, times gamma sqrt(in / r) / s."""
    r, n = A.shape
    return -gamma * (n / r) ** 0.5 / s * G @ np.linalg.pinv(A)


def gora_ranks(Ws, Gs, r, least, most):
    """He et al. 2025: ranks by the mean of |W o G|, at the parameters of rank r."""
    importance = np.array([np.abs(W * G).mean() for W, G in zip(Ws, Gs, strict=True)])
    size = np.array([(W.shape[0] + W.shape[1]) ** 0.5 for W in Ws])
    share = importance / importance.sum() * (size.sum() * r)
    return [int(min(max(round(x), least), most)) for x in share / size]


def keeplora(W, G, r, protected=0.5):
    """Luo et al. 2026: the protected basis M (in, k), and the r leading right vectors of G (I - M M')."""
    _, S, V = np.linalg.svd(W)
    k = int(np.searchsorted(np.cumsum(S**2) / np.sum(S**2), protected)) + 1
    M = V[:k].T
    return M, np.linalg.svd(G @ (np.eye(W.shape[1]) - M @ M.T))[2][:r]


def eva(X, r):
    """Paischer et al. 2024: the r leading right singular vectors of the inputs (n, in)."""
    return np.linalg.svd(X, full_matrices=False)[2][:r]


def corda(W, X, r, s, least=False, damp=1e-3):
    """Yang et al. 2024: s B0 A0, the chosen part of W by its effect on the inputs X (n, in)."""
    C = X.T @ X
    C = C + damp * np.mean(np.diag(C)) * np.eye(len(C))
    U, S, V = np.linalg.svd(W @ C, full_matrices=False)
    own = slice(len(S) - r, len(S)) if least else slice(0, r)
    return (U[:, own] * S[own]) @ V[own] @ np.linalg.inv(C)
