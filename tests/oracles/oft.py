"""OFT (Qiu et al. 2023, section 3; Qiu et al. 2025, section 3.3) and BOFT (Liu et al. 2023, section 4),
dense."""

import numpy as np


def weight(W, t, options):
    size = W.shape[0] if options.get("turns outputs") else W.shape[1]
    b = options["block"]
    blocks = [_rotation(_skew(u, b), options.get("terms", 6)) for u in t["Q"]]
    R = block_diag(*(blocks * (size // b) if len(blocks) == 1 else blocks))
    return R.T @ W if options.get("turns outputs") else W @ R.T


def block_diag(*blocks):
    size = sum(map(len, blocks))
    R, at = np.zeros((size, size)), 0
    for block in blocks:
        R[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return R


def _skew(numbers, b):
    U = np.zeros((b, b))
    U[np.triu_indices(b, 1)] = numbers
    return U - U.T


def _rotation(Q, terms):
    eye = np.eye(len(Q))
    if terms == 0:
        return (eye - Q) @ np.linalg.inv(eye + Q)
    series = sum(np.linalg.matrix_power(Q, k) for k in range(terms - 1))
    return (eye + Q) @ series


def butterfly(W, t, options):
    size = W.shape[0] if options.get("turns outputs") else W.shape[1]
    b, R = options["block"], np.eye(size)
    for level, P in enumerate(t["P"]):
        D = block_diag(*(_rotation((p - p.T) / 2, 0) for p in P))
        M = _exchange(size, b, level)
        R = M @ D @ M.T @ R
    s = np.diag(t["s"])
    return s @ R.T @ W if options.get("turns outputs") else s @ W @ R.T


def _exchange(size, b, level):
    """Row k picks the number at place k once groups of 2^(level + 1) half blocks are sorted, even ones
    first."""
    half, M = b // 2, np.zeros((size, size))
    group = 2 ** (level + 1) * half
    for k in range(size):
        start, inside = k - k % group, k % group
        number, rest = divmod(inside, half)
        there = 2 * number if number < 2**level else 2 * number - 2 ** (level + 1) + 1
        M[k, start + there * half + rest] = 1
    return M
