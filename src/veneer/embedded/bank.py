"""Messages of a bank's customers with their intents: synthetic, made of a few sentences and names.

The sentences of test messages stand in no message to learn from.
"""

from __future__ import annotations

import json
import random
from typing import Any

SYSTEM = "You read messages of a bank's customers. Answer with the intent and its details as JSON."
NAMES = ("Anna", "Omar", "Lena", "Tom", "Mei", "Jonas", "Priya", "Carlos", "Sofia", "Yusuf")
SHOPS = ("the bakery", "Booksy", "GreenMart", "a taxi", "StreamBox", "the gym", "AirNord", "a hotel")
LANDS = ("Spain", "Japan", "Canada", "Kenya", "Brazil", "Norway")

# Sentences by intent; the last one of each is kept for the test.
SENTENCES: dict[str, tuple[str, ...]] = {
    "transfer": (
        "send {amount} euros to {name}",
        "please transfer {amount} to {name} today",
        "I want to give {name} {amount} euros",
        "can you move {amount} euros to {name}'s account",
    ),
    "block_card": (
        "I lost my card, please block it",
        "my card was stolen in {land}, stop it now",
        "block my card, I cannot find it",
        "someone took my wallet with the card, lock it",
    ),
    "dispute": (
        "I did not pay {amount} at {shop}",
        "there is a charge of {amount} from {shop} that is not mine",
        "{shop} took {amount} euros twice",
        "why was I charged {amount} by {shop}, I never bought that",
    ),
    "balance": (
        "how much money do I have",
        "what is my balance",
        "tell me what is left on my account",
        "how much is in my account right now",
    ),
    "travel": (
        "I will travel to {land} next week",
        "please let my card work in {land}",
        "I am going to {land}, can I pay there",
        "heading to {land} soon, make sure my card is fine",
    ),
    "limit": (
        "raise my limit to {amount}",
        "I need a daily limit of {amount} euros",
        "set the limit of my card to {amount}",
        "could my spending limit become {amount}",
    ),
    "pin": (
        "I forgot my pin",
        "how do I change my pin",
        "my pin does not work, I need a new one",
        "the machine refuses my pin, help me reset it",
    ),
    "loan": (
        "I would like to borrow {amount} euros",
        "can I get a loan of {amount}",
        "what would a credit of {amount} cost me",
        "lend me {amount} for a used car",
    ),
}
DETAILS = {"amount": "amount", "name": "to", "shop": "shop", "land": "country"}


def message(intent: str, sentence: str, draw: random.Random) -> dict[str, Any]:
    """Returns a conversation: the message, and its intent and details as JSON."""
    choices = {
        "amount": draw.choice((5, 12, 20, 35, 48, 60, 75, 99, 120, 150, 240, 300, 450, 800, 1500)),
        "name": draw.choice(NAMES),
        "shop": draw.choice(SHOPS),
        "land": draw.choice(LANDS),
    }
    details = {DETAILS[k]: v for k, v in choices.items() if f"{{{k}}}" in sentence}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": sentence.format(**choices)},
        {"role": "assistant", "content": json.dumps({"intent": intent, **details})},
    ]
    return {"messages": messages}


def rows(part: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Returns n different messages of a part: train, valid or test."""
    draw = random.Random(f"{part} {seed}")
    kept = {i: s[-1:] if part == "test" else s[:-1] for i, s in SENTENCES.items()}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(50 * n):
        intent = draw.choice(list(kept))
        row = message(intent, draw.choice(kept[intent]), draw)
        found.setdefault(row["messages"][1]["content"], row)
        if len(found) == n:
            break
    return list(found.values())
