"""Chooses each row's next token: all rows at once, every answer with draws of its own seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.serve.engine.request import Alternative, Logprob, Sampling

NARROW = 1024  # candidates looked at before all tokens are sorted


class Draws:
    """One answer's random numbers and the tokens that penalties count."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], seed: int) -> None:
        self.sampling = sampling
        self.random = random.Random(seed)
        self.counts: Counter[int] = Counter()
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else set()

    def took(self, token: int) -> None:
        """Notes a chosen token."""
        self.counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self.seen.add(token)


class Choice(NamedTuple):
    """A row's token, or None where its logits are not finite."""

    token: int | None
    logprob: Logprob | None


def choose(logits: Tensor, rows: Sequence[Draws]) -> list[Choice]:
    """Returns one choice a row.  logits: (rows, vocabulary), overwritten."""
    logits = logits.float()
    finite = (logits.amax(-1) - logits.amin(-1)).isfinite().tolist()
    if not all(finite):
        logits = torch.where(torch.tensor(finite, device=logits.device)[:, None], logits, 0.0)
    reported = [i for i, r in enumerate(rows) if r.sampling.logprobs is not None]
    plain = torch.log_softmax(logits[reported], -1) if reported else None
    for i, r in enumerate(rows):
        _adjust(logits[i], r)
    tokens = logits.argmax(-1)
    drawn = [i for i, r in enumerate(rows) if not r.sampling.is_greedy]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    chosen: list[int] = tokens.tolist()
    logprobs = dict(zip(reported, plain, strict=True)) if plain is not None else {}
    return [
        Choice(
            t if ok else None,
            report(logprobs[i], t, rows[i].sampling.logprobs or 0) if i in logprobs else None,
        )
        for i, (t, ok) in enumerate(zip(chosen, finite, strict=True))
    ]


def report(logprobs: Tensor, token: int, n: int) -> Logprob:
    """Returns the token's log-probability and the n likeliest tokens'.  logprobs: (vocabulary,)."""
    top: tuple[Alternative, ...] = ()
    if n:
        values, indices = logprobs.topk(n)
        top = tuple(Alternative(i, v) for i, v in zip(indices.tolist(), values.tolist(), strict=True))
    return Logprob(token, float(logprobs[token]), top)


def _adjust(row: Tensor, r: Draws) -> None:
    """Applies biases and penalties to one row's logits in place."""
    s = r.sampling
    if s.repetition_penalty != 1 and r.seen:
        at = torch.tensor(sorted(r.seen), device=row.device)
        row[at] = torch.where(row[at] > 0, row[at] / s.repetition_penalty, row[at] * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and r.counts:
        at = torch.tensor(list(r.counts), device=row.device)
        n = row.new_tensor(list(r.counts.values()))
        row[at] -= s.presence_penalty + s.frequency_penalty * n
    if s.logit_bias:
        row[torch.tensor(list(s.logit_bias), device=row.device)] += row.new_tensor(
            list(s.logit_bias.values())
        )


def _draw(logits: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Draws one token a row by inverting the cumulative distribution, after temperature and bounds."""
    temperature = logits.new_tensor([r.sampling.temperature for r in rows])
    p = torch.softmax(logits / temperature[:, None], -1)
    u = torch.tensor([r.random.random() for r in rows], dtype=torch.float64, device=logits.device)
    tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    free = [i for i, r in enumerate(rows) if not _is_bounded(r.sampling)]
    if free:
        tokens[free] = _invert(p[free].double(), u[free])
    for i, r in enumerate(rows):
        if _is_bounded(r.sampling):
            tokens[i] = _bounded(p[i], u[i], r.sampling)
    return tokens


def _is_bounded(s: Sampling) -> bool:
    return s.top_p < 1 or s.top_k > 0 or s.min_p > 0


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """Returns the first index whose cumulative share of p (rows, n) exceeds u (rows,)."""
    c = p.cumsum(-1)
    index = torch.searchsorted(c, (u * c[:, -1])[:, None], right=True)[:, 0]
    return torch.minimum(
        index, (p > 0).long().cumsum(-1).argmax(-1)
    )  # rounding must not reach a token of share 0


def _bounded(p: Tensor, u: Tensor, s: Sampling) -> Tensor:
    """Draws from the likeliest tokens within top_k, top_p and min_p.  p: (vocabulary,)."""
    n = min(s.top_k or len(p), len(p))
    values, indices = p.topk(min(n, NARROW))
    if len(values) < n and (float(values.sum()) < s.top_p or (s.min_p and values[-1] >= s.min_p * values[0])):
        values, indices = p.topk(n)
    kept = values.double()
    before = kept.cumsum(0) - kept
    kept = torch.where(before < s.top_p * (kept.sum() if s.top_k else 1.0), kept, 0.0)
    kept = torch.where(values >= s.min_p * values[0], kept, 0.0)
    return indices[_invert(kept[None], u[None])[0]]
