"""Chooses the setting that learns most among those whose forgetting is surely within a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Offer(NamedTuple):
    """One strength of one candidate on validation text.

    cost: of new text, less is better; forgot: relative loss on known text; most: its upper bound, None where
    too few examples allow one.
    """

    strength: float
    cost: float
    forgot: float
    most: float | None


class Pick(NamedTuple):
    """The chosen candidate and its offer, None without one that learns; and the reason in words."""

    name: str | None
    offer: Offer | None
    reason: str


def level(candidates: int, confidence: float = CONFIDENCE) -> float:
    """Returns the level of a two-sided interval whose upper end bounds one candidate's forgetting.

    The chance of error is split over candidates (Bonferroni). Strengths of one candidate share it: `pick`
    accepts them in rising order up to the first that fails, which is a fixed sequence of tests (Maurer,
    Hothorn & Lehmacher 1995).
    """
    return 1 - 2 * (1 - confidence) / max(1, candidates)


def within(offers: Sequence[Offer], limit: float) -> list[Offer]:
    """Returns the strengths below the first whose bound exceeds the limit."""
    found = []
    for offer in sorted(offers, key=lambda o: o.strength):
        if offer.most is None or offer.most > limit:
            break
        found.append(offer)
    return found


def pick(candidates: Mapping[str, Sequence[Offer]], limit: float, base: float) -> Pick:
    """Returns the offer of least cost within the limit.

    candidates: offers by name, strength 0 left out. base: the cost of new text without any change.
    """
    allowed = [(name, o) for name, offers in candidates.items() for o in within(offers, limit)]
    if any(offer.most is None for offers in candidates.values() for offer in offers):
        return Pick(None, None, "known text has too few examples to bound forgetting; give 16 or more")
    good = [(name, o) for name, o in allowed if o.cost < base]
    if good:
        name, best = min(good, key=lambda entry: entry[1].cost)
        gain = f"gains {base - best.cost:.4g} on valid text"
        return Pick(name, best, f"{name} at strength {best.strength:g} {gain} and forgets {_shown(best)}")
    every = [(name, o) for name, offers in candidates.items() for o in offers if o.cost < base]
    if not every:
        return Pick(None, None, "no candidate learns anything at any strength")
    name, mild = min(every, key=lambda entry: entry[1].most or 0.0)
    price = f"the mildest that learns, {name} at strength {mild.strength:g}, forgets {_shown(mild)}"
    return Pick(
        None, None, f"nothing learns within {limit:.2%}: {price} for a gain of {base - mild.cost:.4g}"
    )


def _shown(offer: Offer) -> str:
    return f"{offer.forgot:.2%} of known text, at most {offer.most:.2%}"
