"""Prefix-tuning (Li & Liang 2021, section 4.2), as He et al. 2022 write its attention (section 3.1)."""

import math

import torch


def head(Q, K, V, P_k, P_v):
    """One head of a causal attention: Q, K, V (n, d) of the text, P_k and P_v (p, d) that every token sees ->
    (n, d).

    The weights of the text and those of the prefix are summed apart: the output is a mixture of both
    attentions.
    """
    rows = []
    for i, q in enumerate(Q):
        own, added = (torch.exp(keys @ q / math.sqrt(len(q))) for keys in (K[: i + 1], P_k))
        rows.append((own @ V[: i + 1] + added @ P_v) / (own.sum() + added.sum()))
    return torch.stack(rows)
