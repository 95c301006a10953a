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
