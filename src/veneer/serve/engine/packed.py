"""Runs a model on one packed row of many sequences' tokens, with attention and caches of each sequence's own.

The model calls its cache and its attention as ever; both are ours. The cache writes new keys and values into the sequences'
strips and lanes, and the attention, registered with transformers as ATTENTION, reads them there.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from veneer.adapt.banks.program import Terms
from veneer.adapt.banks.segments import SegmentBank
from veneer.serve.engine.lanes import Lane, Pair, Strip, capacity, chunk_mask, decode_mask

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


class Work(NamedTuple):
    """Tokens of one sequence in this step. sampled: 0 for none, 1 for the last token's logits, -1 for all tokens'."""

    held: Held
    tokens: Sequence[int]
    terms: Terms
    sampled: int


class Step:
    """Where the tokens of one packed row lie, and what they may look at."""

    def __init__(
        self,
        chunks: Sequence[tuple[Held, int, int]],
        lanes: Sequence[tuple[Lane, list[int]]],
        device: torch.device,
    ) -> None:
        """chunks: (sequence, first token, tokens) of prompts; lanes: (lane, the place of each row's token)."""
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
        """Returns each token's attention over its own sequence.  q: (1, heads, tokens, head_dim) -> (1, tokens, heads, d)."""
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
    q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None, scale: float | None, cap: float | None, *, causal: bool
) -> Tensor:
    """softmax(scale q k') v with masked places left out; scores bounded by cap * tanh(. / cap) where there is one."""
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
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    unknown = [name for name in UNKNOWN if given.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"packed attention lacks {', '.join(unknown)}")
    out = step.attend(query, given.get("scaling"), given.get("sliding_window"), given.get("softcap"))
    return out, None


class StepCache(Cache):
    """Hands new keys and values to the step; transformers asks it for nothing else where positions are given."""

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **given: Any) -> Any:
        self.step.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Packed:
    """A model that computes packed steps."""

    static = False

    def __init__(self, model: Any, bank: SegmentBank) -> None:
        AttentionInterface.register(ATTENTION, attention)
        self.model, self.bank = model, bank
        self.before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)
        self.lanes: dict[int, Lane] = {}
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def close(self) -> None:
        """Gives the model its own attention back."""
        self.model.set_attn_implementation(self.before)

    def start(self, prompt_tokens: int) -> Held:
        """Returns an empty cache for a prompt."""
        return Held(prompt_tokens)

    def _enter(self, held: Held, length: int) -> None:
        """Moves a sequence into the lane for a length, where it is not there."""
        size = capacity(length)
        if held.lane is not None and held.lane.tokens == size:
            return
        lane = self.lanes.setdefault(size, Lane(size))
        layers = sorted((held.strip or held.lane).layers)  # type: ignore[union-attr]
        old = held.lane
        lane.enter(held, held.length, held.source, layers)
        if old is not None:
            old.leave(held)
        held.strip, held.lane = None, lane

    def drop(self, held: Held) -> None:
        """Frees a sequence's cache."""
        if held.lane is not None:
            held.lane.leave(held)
        held.strip = held.lane = None

    def reset(self) -> None:
        """Forgets all sequences."""
        self.lanes = {}
        self.bank.use()

    @property
    def bytes(self) -> int:
        """Bytes of all lanes."""
        return sum(lane.bytes for lane in self.lanes.values())

    @torch.inference_mode()
    def step(self, works: Sequence[Work], *, decoding: Sequence[bool]) -> list[Tensor | None]:
        """Computes the tokens of all sequences, and returns the logits that each wants: (1 or tokens, vocabulary).

        decoding[i]: works[i] is the newest token of an answer; every sequence in a lane must be among these.
        """
        order = sorted(range(len(works)), key=lambda i: [(p.stack, p.place, s) for p, s in works[i].terms])
        for i in order:
            if decoding[i]:
                self._enter(works[i].held, works[i].held.length + 1)
        starts, tokens, positions = self._lay_out(works, order)
        step = self._plan(works, starts, decoding)
        wanted = [
            range(starts[i] + (len(w.tokens) - 1 if w.sampled > 0 else 0), starts[i] + len(w.tokens))
            if (w := works[i]).sampled
            else range(0)
            for i in order
        ]
        self.bank.use(
            [(works[i].terms, len(works[i].tokens)) for i in order],
            [(works[i].terms, len(rows)) for i, rows in zip(order, wanted, strict=True)],
        )
        logits = self._forward(step, tokens, positions, [r for rows in wanted for r in rows])
        for w in works:
            w.held.length += len(w.tokens)
        found: list[Tensor | None] = [None] * len(works)
        at = 0
        for i, rows in zip(order, wanted, strict=True):
            found[i] = logits[at : at + len(rows)] if len(rows) else None
            at += len(rows)
        return found

    def _lay_out(self, works: Sequence[Work], order: Sequence[int]) -> tuple[dict[int, int], list[int], list[int]]:
        starts: dict[int, int] = {}
        tokens: list[int] = []
        positions: list[int] = []
        for i in order:
            w = works[i]
            starts[i] = len(tokens)
            tokens += w.tokens
            positions += range(w.held.length, w.held.length + len(w.tokens))
        return starts, tokens, positions

    def _plan(self, works: Sequence[Work], starts: dict[int, int], decoding: Sequence[bool]) -> Step:
        place = {id(w.held): starts[i] for i, w in enumerate(works)}
        lanes = [lane for lane in self.lanes.values() if lane.owners]
        for lane in lanes:
            lane.lengths = [held.length + 1 for held in lane.owners]  # type: ignore[attr-defined]
        chunks = [
            (w.held, starts[i], len(w.tokens)) for i, w in enumerate(works) if not decoding[i]
        ]
        return Step(chunks, [(lane, [place[id(held)] for held in lane.owners]) for lane in lanes], self.model.device)

    def _forward(self, step: Step, tokens: list[int], positions: list[int], rows: list[int]) -> Tensor:
        device = self.model.device
        keep = torch.tensor(rows, dtype=torch.long, device=device)
        given: dict[str, Any] = {"logits_to_keep": keep} if self.selects else {}
        _now.step = step
        try:
            out = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=StepCache(step),
                use_cache=True,
                **given,
            ).logits[0]
        finally:
            _now.step = None
        return out if self.selects else out[keep]
