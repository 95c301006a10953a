"""Judges claims of the papers by the figures of a study, each by a rule that was fixed before the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from veneer.models.short_names import SMOLLM2
from veneer.ops.intervals import of_difference
from veneer.search.study.later import STEPS
from veneer.search.study.protocol import AST, BALANCED, DECAY, DROPOUT, FAR, HIGH, LORA, LOW, MUON, NEAR
from veneer.tasks import Metric

HOLDS, FAILS, NOISE, UNKNOWN = "holds", "does not hold", "inside the noise", "not measured"
Rows = Mapping[str, Mapping[str, Any]]
Parts = Mapping[str, Rows]


class Verdict(NamedTuple):
    """One claim on one text: the source, the claim in words, the outcome, and the figures behind it."""

    source: str
    claim: str
    text: str
    outcome: str
    figures: str


class Claim(NamedTuple):
    """A claim and its rule, which returns an outcome and figures for the rows of one text, by label."""

    source: str
    words: str
    rule: Callable[[Rows, Metric], tuple[str, str]]
    texts: Sequence[str] = (NEAR, FAR)


def judged(parts: Parts, metric: Metric) -> list[Verdict]:
    """Returns a verdict on every claim for every text of the study that was measured."""
    found = []
    for claim in CLAIMS:
        for text in claim.texts:
            if text in parts:
                found.append(Verdict(claim.source, claim.words, text, *claim.rule(parts[text], metric)))
    return found


def _worse(first: str, second: str) -> Callable[[Rows, Metric], tuple[str, str]]:
    """Returns the rule that `first` scores worse on test text than `second`, by Welch's interval."""

    def rule(rows: Rows, metric: Metric) -> tuple[str, str]:
        return _differ(rows, metric, first, second, lambda r: r["values"])

    return rule


def _differ(
    rows: Rows, metric: Metric, first: str, second: str, of: Callable[[Mapping[str, Any]], Sequence[float]]
) -> tuple[str, str]:
    """Returns HOLDS if the first costs more than the second beyond noise, FAILS if it costs less."""
    a, b = (of(rows[label]) if label in rows else [] for label in (first, second))
    if len(a) < 2 or len(b) < 2:
        return UNKNOWN, ""
    d = of_difference([metric.cost(v) for v in a], [metric.cost(v) for v in b])
    assert d.low is not None and d.high is not None
    figures = f"{first} - {second}: {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
    return (HOLDS if d.low > 0 else FAILS if d.high < 0 else NOISE), figures


def _alike(first: str, second: str) -> Callable[[Rows, Metric], tuple[str, str]]:
    """Returns the rule that two contenders cannot be told apart."""

    def rule(rows: Rows, metric: Metric) -> tuple[str, str]:
        outcome, figures = _differ(rows, metric, first, second, lambda r: r["values"])
        return {HOLDS: FAILS, NOISE: HOLDS}.get(outcome, outcome), figures

    return rule


def _forgets_less_at_equal_learning(rows: Rows, metric: Metric) -> tuple[str, str]:
    """Compares known text where full fine-tuning's dial scores as LoRA at its recommended strength."""
    full, lora = (rows[label]["front"][-1:] if label in rows else [] for label in ("full", LORA))
    if not full or not lora or full[0]["known"] is None:
        return UNKNOWN, ""
    target, known = f"target_{metric.name}", f"known_{metric.name}"
    own = next(p for p in lora[0]["points"] if p["strength"] == lora[0]["recommended"])
    other = known_at(full[0]["points"], own[target], target, known, metric)
    if other is None:
        return UNKNOWN, "full fine-tuning's dial does not pass LoRA's score"
    gap = metric.cost(own[known]) - metric.cost(other)
    figures = f"at {own[target]:.4f} on new text: lora {own[known]:.4f}, full {other:.4f} on known text"
    return (HOLDS if gap < 0 else FAILS), f"{figures}; one seed each"


def known_at(
    points: Sequence[Mapping[str, float]], wanted: float, target: str, known: str, metric: Metric
) -> float | None:
    """Returns known text's figure where the dial first passes a score on new text, None if it never does."""
    order = sorted(points, key=lambda p: p["strength"])
    for a, b in pairwise(order):
        ca, cb = metric.cost(a[target]), metric.cost(b[target])
        if cb <= metric.cost(wanted) <= ca and ca > cb:
            share = (ca - metric.cost(wanted)) / (ca - cb)
            return a[known] + share * (b[known] - a[known])
    return None


def _sooner(
    first: str, second: str, key: str = "steps_to_reference", words: str = "the reference"
) -> Callable[[Rows, Metric], tuple[str, str]]:
    """Returns the rule that `first` reaches a reference in fewer steps. key: of the steps in a row."""

    def rule(rows: Rows, metric: Metric) -> tuple[str, str]:
        found = [rows[label].get(key) if label in rows else None for label in (first, second)]
        shown = [
            f"{n} {f['mean']:.0f}" if f else f"{n} never" for n, f in zip((first, second), found, strict=True)
        ]
        a, b = found
        if first not in rows or second not in rows:
            return UNKNOWN, ""
        if a is None and b is None:
            return UNKNOWN, f"neither {first} nor {second} reached {words}"
        if a is None or b is None:
            return (FAILS if a is None else HOLDS), f"steps to {words}: {', '.join(shown)}"
        apart = None not in (a["low"], b["low"]) and (a["high"] < b["low"] or b["high"] < a["low"])
        outcome = NOISE if not apart else HOLDS if a["mean"] < b["mean"] else FAILS
        return outcome, f"steps to {words}: {', '.join(shown)}"

    return rule


def _times_full(rows: Rows, metric: Metric) -> tuple[str, str]:
    """The best LoRA rate is 5 to 20 times full fine-tuning's."""
    low, full = (rows[label]["lr"] if label in rows else None for label in (LORA, "full"))
    if low is None or full is None:
        return UNKNOWN, ""
    ratio = low / full
    return (HOLDS if 5 <= ratio <= 20 else FAILS), f"{low:g} against {full:g}: {ratio:.1f} times"


def _high_rank(rows: Rows, metric: Metric) -> tuple[str, str]:
    """Full fine-tuning's change needs ten times LoRA's rank (8) for 90 % of its energy."""
    rank = rows.get("full", {}).get("measures", {}).get("energy_rank")
    if rank is None:
        return UNKNOWN, ""
    return (HOLDS if rank >= 80 else FAILS), f"median rank of 90 % energy: {rank:g}; LoRA's rank: 8"


def _intrudes(rows: Rows, metric: Metric) -> tuple[str, str]:
    """LoRA has more intruder dimensions than full fine-tuning."""
    counts = [rows.get(label, {}).get("measures", {}).get("intruders") for label in (LORA, "full")]
    if None in counts:
        return UNKNOWN, ""
    return (HOLDS if counts[0] > counts[1] else FAILS), f"lora {counts[0]}, full {counts[1]}"


def _no_collapse(rows: Rows, metric: Metric) -> tuple[str, str]:
    """LoRA of a higher rank never scores worse than of the next lower one, beyond noise."""
    order = [label for label in (LOW, LORA, HIGH) if label in rows]
    steps = [_differ(rows, metric, more, less, lambda r: r["values"]) for less, more in pairwise(order)]
    if len(order) < 3 or any(outcome == UNKNOWN for outcome, _ in steps):
        return UNKNOWN, ""
    worse = any(outcome == HOLDS for outcome, _ in steps)
    return (FAILS if worse else HOLDS), "; ".join(figures for _, figures in steps)


def _less_diverse(rows: Rows, metric: Metric) -> tuple[str, str]:
    """Full fine-tuning gives fewer unique answers among samples of a prompt than LoRA."""
    found = [rows.get(label, {}).get("measures", {}).get("answers") for label in ("full", LORA)]
    if None in found:
        return UNKNOWN, ""
    full, lora = (one["unique_right"] + one["unique_wrong"] for one in found)
    figures = f"unique answers: full {full:.1f}, lora {lora:.1f}; one seed each"
    return (HOLDS if full < lora else FAILS), figures


def _to_lora(*names: tuple[str, str]) -> list[Claim]:
    """Returns the claims of speed by the second reference (see `later`)."""
    words = "90 % of LoRA's gain"
    return [
        Claim(source, f"{source} reaches {words} sooner (added later)", _sooner(label, LORA, STEPS, words))
        for source, label in names
    ]


BIDERMAN = "LoRA Learns Less and Forgets Less"
REGRET = "LoRA Without Regret"
EVERY = (NEAR, FAR, SMOLLM2)  # claims that real weights confirm or not
CLAIMS = (
    Claim(BIDERMAN, "LoRA learns less than full fine-tuning", _worse(LORA, "full"), EVERY),
    Claim(BIDERMAN, "LoRA forgets less at equal learning", _forgets_less_at_equal_learning, EVERY),
    Claim(BIDERMAN, "weight decay learns like plain full fine-tuning", _alike(DECAY, "full")),
    Claim(BIDERMAN, "full fine-tuning's change has 10 times LoRA's rank", _high_rank, EVERY),
    Claim(
        BIDERMAN,
        "LoRA of high rank learns instructions like full fine-tuning",
        _alike(HIGH, "full"),
        (AST, SMOLLM2),
    ),
    Claim(
        BIDERMAN,
        "attention dropout learns like plain full fine-tuning",
        _alike(DROPOUT, "full"),
        (NEAR, FAR, AST),
    ),
    Claim(BIDERMAN, "full fine-tuning's answers are less diverse than LoRA's", _less_diverse, (AST,)),
    Claim("LoRA", "low rank suffices near the pretraining data", _alike(LOW, HIGH), (NEAR,)),
    Claim("LoRA", "high rank is needed far from it", _worse(LOW, HIGH), (FAR,)),
    Claim("LoRA", "scores do not fall with more parameters", _no_collapse, EVERY),
    Claim(REGRET, "MLP alone does as well as all layers", _alike("lora-mlp", LORA), EVERY),
    Claim(REGRET, "attention alone does worse than MLP alone", _worse("lora-attention", "lora-mlp")),
    Claim(REGRET, "the best LoRA rate is about 10 times full fine-tuning's", _times_full, EVERY),
    Claim("LoRA+", "LoRA+ reaches the reference sooner than tuned LoRA", _sooner("loraplus", LORA), EVERY),
    Claim("LoRA-Pro", "LoRA-Pro learns like full fine-tuning", _alike("lorapro", "full")),
    Claim("LoRA-Pro", "LoRA-Pro learns more than tuned LoRA", _worse(LORA, "lorapro")),
    Claim("Balanced LoRA+", "the balanced ratio learns like full fine-tuning", _alike(BALANCED, "full")),
    Claim("LoRA-Muon", "the spectral ratio learns like full fine-tuning", _alike(MUON, "full")),
    Claim("PiSSA", "PiSSA reaches the reference sooner than tuned LoRA", _sooner("pissa", LORA)),
    Claim("OLoRA", "OLoRA reaches the reference sooner than tuned LoRA", _sooner("olora", LORA)),
    Claim("LoRA-GA", "LoRA-GA reaches the reference sooner than tuned LoRA", _sooner("loraga", LORA)),
    Claim("MiSS", "MiSS learns more than tuned LoRA", _worse(LORA, "miss")),
    *_to_lora(("LoRA+", "loraplus"), ("PiSSA", "pissa"), ("OLoRA", "olora"), ("LoRA-GA", "loraga")),
    Claim("Intruder dimensions", "LoRA has intruders, full fine-tuning fewer", _intrudes, EVERY),
)
