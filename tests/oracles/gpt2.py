"""The logits of a GPT-2 (Radford et al. 2019, section 2.3: norms come first) in float64, and where baselines
change them."""

import math

import torch

from oracles import prefix

HEADS = 4


def unchanged(part, layer, x, h):
    return h


def logits(t, ids, change=unchanged, front=None):
    """ids (n,) of one text -> (n, vocabulary). t: the model's parameters by name.

    change: what becomes of the output h of the "attention" or "feed-forward" part of a layer, which read x,
    before it is added to the stream. front: by layer, the keys and values (heads, p, d) that stand in front
    of the text's own.
    """
    h = t["transformer.wte.weight"][ids] + t["transformer.wpe.weight"][: len(ids)]
    layers = len({name.split(".")[2] for name in t if name.startswith("transformer.h.")})
    for i in range(layers):
        lead = f"transformer.h.{i}"
        x = norm(h, t, f"{lead}.ln_1")
        q, k, v = linear(x, t, f"{lead}.attn.c_attn").chunk(3, -1)
        h = h + change(
            "attention", i, x, linear(attention(q, k, v, front and front[i]), t, f"{lead}.attn.c_proj")
        )
        x = norm(h, t, f"{lead}.ln_2")
        h = h + change(
            "feed-forward", i, x, linear(gelu(linear(x, t, f"{lead}.mlp.c_fc")), t, f"{lead}.mlp.c_proj")
        )
    return norm(h, t, "transformer.ln_f") @ t["lm_head.weight"].T


def attention(q, k, v, front):
    """q, k and v (n, width) -> (n, width)."""
    split = zip(*(m.chunk(HEADS, -1) for m in (q, k, v)), strict=True)
    nothing = q.new_zeros(HEADS, 0, q.shape[1] // HEADS)
    K, V = front or (nothing, nothing)
    return torch.cat([prefix.head(*own, K[i], V[i]) for i, own in enumerate(split)], -1)


def norm(x, t, name):
    centred = x - x.mean(-1, keepdim=True)
    return (
        t[f"{name}.weight"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        + t[f"{name}.bias"]
    )


def linear(x, t, name):
    return x @ t[f"{name}.weight"] + t[f"{name}.bias"]


def gelu(x):
    """Hendrycks & Gimpel 2016, section 2: the approximation by tanh."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
