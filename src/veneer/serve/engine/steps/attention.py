"""Attention of one packed row: each sequence's tokens look at that sequence's own keys and values.

Models call their cache and their attention through transformers' interfaces, and both are ours. The cache
writes new keys and values into strips and lanes; the attention, registered as ATTENTION, reads them there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from veneer.serve.engine.steps.lanes import Lane, Pair, Strip, chunk_mask, decode_mask

ATTENTION = "veneer_packed"
UNKNOWN = ("s_aux", "position_bias", "sinks")  # arguments of attentions that this one does not compute
_now = threading.local()


class Held:
    """One sequence's cache: a strip while its prompt is read, then a row of a lane."""

    def __init__(self, prompt_tokens: int) -> None:
        self.length = 0
        self.strip: Strip | None = Strip(prompt_tokens)
        self.lane: Lane | None = None

    def source(self, layer: int) -> Pair:
        """Returns keys and values (1, heads, >= length, head_dim) of a layer, as views."""
        if self.strip is not None:
            return self.strip.layers[layer]
        assert self.lane is not None
        return self.lane.row(self)(layer)


class Step:
    """Where the tokens of one packed row lie, and what they may look at."""

    def __init__(
        self,
        chunks: Sequence[tuple[Held, int, int]],
        lanes: Sequence[tuple[Lane, list[int]]],
        device: torch.device,
    ) -> None:
        """chunks: (sequence, first token, tokens) of prompts; lanes: (lane, the place of each row's
        token).
        """
        self.chunks = list(chunks)
        self.lanes = [(lane, torch.tensor(at, device=device)) for lane, at in lanes]
        self.rows = [
            (torch.arange(len(lane.owners), device=device), torch.tensor(lane.lengths, device=device) - 1)
            for lane, _ in lanes
        ]
        self.layer = 0
        self.masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps the new keys and values (1, heads, tokens, head_dim) of a layer."""
        self.layer = layer
        for held, start, n in self.chunks:
            assert held.strip is not None
            held.strip.write(layer, k[0, :, start : start + n], v[0, :, start : start + n], held.length)
        for (lane, at), (rows, position) in zip(self.lanes, self.rows, strict=True):
            for into, new in zip(lane.layers[layer], (k, v), strict=True):
                into[rows, :, position] = new[0].index_select(1, at).transpose(0, 1)

    def attend(self, q: Tensor, scale: float | None, window: int | None, cap: float | None) -> Tensor:
        """Returns each token's attention over its own sequence.  q: (1, heads, tokens, head_dim) -> (1,
        tokens, heads, d).
        """
        found: list[tuple[Tensor, Tensor | slice]] = []
        for i, (held, start, n) in enumerate(self.chunks):
            assert held.strip is not None
            K, V = held.strip.layers[self.layer]
            end = held.length + n
            mask = self._mask((0, i, window), lambda h=held, n=n: chunk_mask(h.length, n, window, q))
            own = q[:, :, start : start + n]
            out = _attend(own, K[:, :, :end], V[:, :, :end], mask, scale, cap, causal=mask is None)
            found.append((out[0].transpose(0, 1), slice(start, start + n)))
        for i, (lane, at) in enumerate(self.lanes):
            t, n = max(lane.lengths), len(lane.owners)
            K, V = (kept[:n, :, :t] for kept in lane.layers[self.layer])
            mask = self._mask((1, i, window), lambda lane=lane: decode_mask(lane.lengths, window, q))
            own = q[0].index_select(1, at).transpose(0, 1)  # (rows, heads, d)
            grouped = own.reshape(n, K.shape[1], -1, own.shape[2])
            out = _attend(grouped, K, V, mask, scale, cap, causal=False)
            found.append((out.reshape(n, -1, out.shape[-1]), at))
        whole = found[0][0].new_empty(q.shape[2], *found[0][0].shape[1:])
        for part, where in found:
            whole[where] = part
        return whole[None]

    def _mask(self, key: tuple[int, int, int | None], make: Any) -> Tensor | None:
        if key not in self.masks:
            self.masks[key] = make()
        return self.masks[key]


def _attend(
    q: Tensor,
    K: Tensor,
    V: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cap: float | None,
    *,
    causal: bool,
) -> Tensor:
    """softmax(scale q k') v with masked places left out; scores bounded by cap * tanh(. / cap) where there is
    one.
    """
    if cap is None:
        return F.scaled_dot_product_attention(
            q, K, V, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=q.shape[1] != K.shape[1]
        )
    K, V = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (K, V))
    scores = (q @ K.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores.float(), -1).to(q.dtype) @ V


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: packed while a step of ours runs, PyTorch's own otherwise."""
    step: Step | None = getattr(_now, "step", None)
    if step is None:
        own: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **given)
        return own
    unknown = [name for name in UNKNOWN if given.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"packed attention lacks {', '.join(unknown)}")
    out = step.attend(query, given.get("scaling"), given.get("sliding_window"), given.get("softcap"))
    return out, None


class StepCache(Cache):
    """Hands new keys and values to the step; transformers asks it for nothing else where positions are
    given.
    """

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **given: Any
    ) -> Any:
        self.step.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@contextmanager
def attending(step: Step) -> Iterator[StepCache]:
    """Within the block ATTENTION computes this step on the calling thread; yields the cache to give to the
    model.
    """
    _now.step = step
    try:
        yield StepCache(step)
    finally:
        _now.step = None


AttentionInterface.register(ATTENTION, attention)
