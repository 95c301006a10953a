"""Rows and bases of every task on text."""

from __future__ import annotations

from typing import Any

from support import heads, tiny

ANIMALS = ("cat", "dogs")


def tagged(seed: int) -> dict[str, Any]:
    words = heads.animal(seed)["text"].split()
    return {"tokens": words, "tags": ["B-ANIMAL" if w in ANIMALS else "O" for w in words]}


def paired(seed: int) -> dict[str, Any]:
    row = heads.animal(seed)
    return {"source": row["text"], "target": row["label"]}


def together(seed: int) -> dict[str, Any]:
    text = tiny.text(seed, 12).split()
    return {"anchor": " ".join(text[:6]), "positive": " ".join(text[:4])}


def rated(seed: int) -> dict[str, Any]:
    first, other = (heads.animal(s) for s in (seed, seed // 3))
    score = float(first["label"] == other["label"])
    return {"text_a": first["text"], "text_b": other["text"], "score": score}


def scored(seed: int) -> dict[str, Any]:
    row = heads.animal(seed)
    return {"text": row["text"], "label": float(row["label"] == "cat")}


def asked(seed: int) -> dict[str, Any]:
    row = heads.animal(seed)
    return {"prompt": f"{row['text']} is ", "completion": row["label"]}


def plain(seed: int) -> dict[str, Any]:
    return {"text": tiny.text(seed, 24)}


def solved(seed: int) -> dict[str, Any]:
    name = "the cat sat on a mat".split()[seed % 6]
    return {"prompt": f"{name} = ", "completion": f"'{name}'\n", "test": f"assert {name} == '{name}'"}


def preferred(seed: int) -> dict[str, Any]:
    row = heads.animal(seed)
    other = next(a for a in ANIMALS if a != row["label"])
    return {"prompt": f"{row['text']} is", "chosen": f" {row['label']}", "rejected": f" {other}"}


def judged(seed: int) -> dict[str, Any]:
    row = preferred(seed)
    good = seed % 3 > 0
    return {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}


# Rows, base, and the least improvement of the metric in the short training below.
CASES: dict[str, tuple[Any, str]] = {
    "causal-lm": (plain, "lm"),
    "answers": (asked, "lm"),
    "code": (solved, "lm"),
    "sequence-classification": (heads.animal, "bert"),
    "sequence-regression": (scored, "bert"),
    "token-classification": (tagged, "bert"),
    "masked-lm": (plain, "masked"),
    "text-to-text": (paired, "t5"),
    "embeddings": (together, "bert"),
    "embedding-similarity": (rated, "bert"),
    "dpo": (preferred, "lm"),
    "ipo": (preferred, "lm"),
    "orpo": (preferred, "lm"),
    "simpo": (preferred, "lm"),
    "kto": (judged, "lm"),
}
