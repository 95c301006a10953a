"""LoRA-Pro (Wang et al. 2024) written naively in float64: dense matrices, pseudo-inverses, a Sylvester
equation as a linear system."""

import numpy as np


def projector(M):
    """Onto the columns of M."""
    return M @ np.linalg.pinv(M)


def projection(G, A, B):
    """Returns the part of G within first-order reach of A and B: G - (1 - P_B) G (1 - P_A)."""
    m, n = G.shape
    return G - (np.eye(m) - projector(B)) @ G @ (np.eye(n) - projector(A.T))


def least_squares(G, A, B, s):
    """The same as the best fit of s (B dA + dB A) to G over all dA and dB, and the rank of that map."""
    m, n = G.shape
    J = np.hstack([np.kron(s * B, np.eye(n)), np.kron(np.eye(m), s * A.T)])
    found, _, rank, _ = np.linalg.lstsq(J, G.ravel(), rcond=1e-12)
    return (J @ found).reshape(m, n), rank


def sylvester(P, Q, C):
    """X with P X + X Q = C."""
    r = len(P)
    return np.linalg.solve(np.kron(P, np.eye(r)) + np.kron(np.eye(r), Q.T), C.ravel()).reshape(r, r)


def paper(gA, gB, A, B, s, x="sylvester"):
    """Theorems 2.1 and 2.3: dA and dB for the X that keeps them nearest to gA and gB, or X = 0."""
    SB, SA = B.T @ B, A @ A.T
    X = sylvester(SB, SA, -np.linalg.inv(SB) @ gA @ A.T / s**2) if x == "sylvester" else np.zeros_like(SA)
    dA = np.linalg.inv(SB) @ gA / s**2 + X @ A
    dB = (np.eye(len(B)) - B @ np.linalg.inv(SB) @ B.T) @ gB @ np.linalg.inv(SA) / s**2 - B @ X
    return dA, dB


def published(A, B, gradients, s, rates, betas=(0.9, 0.999), eps=1e-8):
    """The AdamW form over several steps, with gradients as functions of s B A, which give G."""
    m, v = np.zeros((len(B), A.shape[1])), np.zeros((len(B), A.shape[1]))
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        G = gradient(s * B @ A)
        dA, dB = paper(s * B.T @ G, s * G @ A.T, A, B, s, "zero")
        E = s * (B @ dA + dB @ A)
        m, v = betas[0] * m + (1 - betas[0]) * E, betas[1] * v + (1 - betas[1]) * E * E
        g = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        dA, dB = paper(s * B.T @ g, s * g @ A.T, A, B, s)
        A, B = A - rate * dA, B - rate * dB
    return A, B


def factored(A, B, gradients, s, rates, betas=(0.9, 0.999)):
    """The low-memory form, written with whole matrices: the mean is carried by its factors, the second moment
    is separable."""
    row, col, mA, mB = np.zeros(len(B)), np.zeros(A.shape[1]), np.zeros_like(A), np.zeros_like(B)
    old = A, B
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        G = gradient(s * B @ A)
        dA, dB = paper(s * B.T @ G, s * G @ A.T, A, B, s, "zero")
        E = s * (B @ dA + dB @ A)
        carried_a, carried_b = np.linalg.pinv(B) @ old[1] @ mA, mB @ old[0] @ np.linalg.pinv(A)
        mA, mB = betas[0] * carried_a + (1 - betas[0]) * dA, betas[0] * carried_b + (1 - betas[0]) * dB
        row = betas[1] * row + (1 - betas[1]) * (E * E).sum(1)
        col = betas[1] * col + (1 - betas[1]) * (E * E).sum(0)
        r, c = row / (1 - betas[1] ** t), col / (1 - betas[1] ** t)
        M = s * (B @ mA + mB @ A) / (1 - betas[0] ** t)
        g = M / np.sqrt(np.outer(r, c) / r.sum())
        dA, dB = paper(s * B.T @ g, s * g @ A.T, A, B, s)
        old = A, B
        A, B = A - rate * dA, B - rate * dB
    return A, B
