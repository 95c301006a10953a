"""Low-rank approximations from the papers' formulas, in numpy: y = W x + b for rows x of X (n, in)."""

from __future__ import annotations

import numpy as np


def svd(W, rank):
    """Eckart & Young."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def lord(W, b, X, rank):
    """LoRD, atomic feature mimicking: the eigenvectors of the outputs' covariance, and the bias."""
    Y = X @ W.T + b
    mean = Y.mean(0)
    w, U = np.linalg.eigh(np.cov(Y.T, bias=True))
    U = U[:, np.argsort(-w)][:, :rank]
    return U @ U.T @ W, U @ U.T @ b + (np.eye(len(W)) - U @ U.T) @ mean


def svd_llm(W, X, rank):
    """SVD-LLM: X'X = S S' by Cholesky, the SVD of W S, and S^-1."""
    S = np.linalg.cholesky(X.T @ X)
    return svd(W @ S, rank) @ np.linalg.inv(S)


def kfac(W, X, G, rank):
    """KFAC-SVD with R = L L' on the outputs' side: the SVD of L' W S, as tr(R D C D') = |L' D S|^2."""
    S, L = np.linalg.cholesky(X.T @ X), np.linalg.cholesky(G.T @ G)
    return np.linalg.inv(L.T) @ svd(L.T @ W @ S, rank) @ np.linalg.inv(S)


def anchored(W, X, Z, rank, sweeps=2000):
    """min |X W' - Z V'| over V of the rank, by alternating least squares from a random start."""
    draw = np.random.default_rng(0)
    Y = X @ W.T
    A = draw.normal(size=(rank, X.shape[1]))
    for _ in range(sweeps):
        B = np.linalg.lstsq(Z @ A.T, Y, rcond=None)[0].T
        A = np.linalg.lstsq(Z, Y @ np.linalg.pinv(B).T, rcond=None)[0].T
    return B @ A


def reconstruction(W, b, V, c, X):
    """Relative error of the outputs of V, c against those of W, b."""
    Y = X @ W.T + b
    return np.linalg.norm(Y - X @ V.T - c) / np.linalg.norm(Y)
