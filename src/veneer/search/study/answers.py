"""Exact answers and their diversity: right greedy answers, and unique ones among samples, right and wrong.

Biderman et al. 2024, https://arxiv.org/abs/2405.09673, section 5: unique strings among samples of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any, NamedTuple

from torch import nn

from veneer.data.tokenizer import Tokenizer
from veneer.search.study.sources import Asked
from veneer.tasks.text.samples import continuations

GREEDY, SAMPLED, EACH = 50, 8, 16  # prompts answered greedily, prompts sampled, samples of each
TEMPERATURE, TOP_P = 0.8, 0.95


class Diversity(NamedTuple):
    """Unique answers among samples of a prompt, in the mean over prompts; right: share of samples right."""

    unique_right: float
    unique_wrong: float
    right: float


def diversity(samples: Sequence[Sequence[str]], truths: Sequence[Callable[[str], bool]]) -> Diversity:
    """Returns the diversity of samples by prompt. truths: tell by prompt if an answer is right."""
    right = [{s for s in some if is_right(s)} for some, is_right in zip(samples, truths, strict=True)]
    wrong = [set(some) - found for some, found in zip(samples, right, strict=True)]
    shares = [mean(s in found for s in some) for some, found in zip(samples, right, strict=True)]
    return Diversity(mean(map(len, right)), mean(map(len, wrong)), mean(shares))


def answered(model: nn.Module, tokenizer: Tokenizer, rows: Sequence[Asked], seed: int = 0) -> dict[str, Any]:
    """Returns the share of exact greedy answers, and the diversity of samples, of the acting adapter."""
    model.eval()

    def say(row: Asked, n: int, **drawing: Any) -> list[str]:
        length = len(tokenizer(row.completion)["input_ids"]) + 8
        found = continuations(model, tokenizer, row.prompt, n=n, seed=seed, max_new_tokens=length, **drawing)
        return [text.strip() for text in found]

    greedy = [say(row, 1, temperature=0.0)[0] == row.completion for row in rows[:GREEDY]]
    some = rows[:SAMPLED]
    samples = [say(row, EACH, temperature=TEMPERATURE, top_p=TOP_P) for row in some]
    found = diversity(samples, [row.completion.__eq__ for row in some])
    return {"exact": mean(greedy), **found._asdict(), "n": len(greedy), "samples": EACH}
