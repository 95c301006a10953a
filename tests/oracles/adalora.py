"""AdaLoRA (Zhang et al. 2023): the change, the importance of triplets, the budget."""

from __future__ import annotations

import numpy as np


def weight(W, t, options):
    """W + alpha / r sum_i b_i e_i a_i', alpha twice the rank of the start unless given."""
    r = options["rank"]
    s = options.get("alpha", 2 * r) / r
    return W + s * sum(t["E"][i, 0] * np.outer(t["B"][:, i], t["A"][i]) for i in range(len(t["E"])))


class Importance:
    """The running averages of |w g| and of its deviation, for one array of numbers."""

    def __init__(self, shape, beta=0.85):
        self.beta, self.I, self.U = beta, np.zeros(shape), np.zeros(shape)

    def see(self, w, g):
        now = np.abs(w * g)
        self.I = self.beta * self.I + (1 - self.beta) * now
        self.U = self.beta * self.U + (1 - self.beta) * np.abs(now - self.I)

    def score(self):
        return self.I * self.U


def triplets(A, E, B):
    """The importance of every triplet from those of its numbers."""
    return np.array([E[i, 0] + A[i].mean() + B[:, i].mean() for i in range(len(E))])


def budget(t, T, b0, bT, ti, tf):
    """The cubic curve, with ti steps before the first removal and tf after the last."""
    if t < ti:
        return b0
    if t >= T - tf:
        return bT
    return bT + (b0 - bT) * (1 - (t - ti) / (T - ti - tf)) ** 3
