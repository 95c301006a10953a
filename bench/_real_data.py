"""Rows of real data sets for `bench/real.py`, from the folder that `make real` fills."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("VENEER_REAL") or Path(__file__).parents[1] / ".real")
SYSTEM = "Answer with one function call as JSON and nothing else."
TEST, VALID = 100, 24  # rows of function calls
RATED, FILMS = 0.5, {"train": 3000, "valid": 300, "test": 2000}  # least |rating|, and rows of film sentences


def calls(folder: Path) -> None:
    """Writes BFCL's questions with one call as conversations: train, valid and test."""
    rows = [row for part in ("simple_python", "multiple", "live_simple") for row in _calls(part)]
    simple = [r for r in rows if r["id"].startswith("simple_python")]
    random.Random(0).shuffle(simple)
    held = {r["id"] for r in simple[: TEST + VALID]}
    asked = {r["messages"][1]["content"].lower() for r in rows if r["id"] in held}
    train = [r for r in rows if r["id"] not in held and r["messages"][1]["content"].lower() not in asked]
    write(folder, {"test": simple[:TEST], "valid": simple[TEST : TEST + VALID], "train": train})


def _calls(part: str) -> list[dict[str, Any]]:
    data = ROOT / "bfcl" / "bfcl_eval" / "data"
    asked, answered = (
        [json.loads(line) for line in (place / f"BFCL_v4_{part}.json").read_text("utf-8").splitlines()]
        for place in (data, data / "possible_answer")
    )
    rows = [_call(q, a["ground_truth"][0]) for q, a in zip(asked, answered, strict=True)]
    return [row for row in rows if row is not None]


def _call(question: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any] | None:
    """Returns a conversation. An argument is the first value allowed, or left out where it may be."""
    turns = question["question"][0]
    if len(turns) > 2 or turns[-1]["role"] != "user":
        return None
    name, arguments = next(iter(truth.items()))
    given = {key: values[0] for key, values in arguments.items() if values and "" not in values}
    known = "\n".join(map(_described, question["function"]))
    messages = [
        {"role": "system", "content": f"{SYSTEM}\n{known}"},
        {"role": "user", "content": turns[-1]["content"]},
        {"role": "assistant", "content": json.dumps({"name": name, "arguments": given})},
    ]
    return {"id": question["id"], "messages": messages}


def _described(function: dict[str, Any]) -> str:
    known = function["parameters"].get("properties", {})
    arguments = ", ".join(f"{name}: {about.get('type', 'any')}" for name, about in known.items())
    return f"{function['name']}({arguments})  {function['description'][:120]}"


def films(folder: Path) -> None:
    """Writes VADER's film sentences as good or bad, documents apart: train, valid and test."""
    text = (ROOT / "vader" / "films.jsonl").read_text("utf-8")
    rated = [row for row in map(json.loads, text.splitlines()) if abs(row["rating"]) >= RATED]
    documents = sorted({row["document"] for row in rated})
    random.Random(0).shuffle(documents)
    place = {document: i for i, document in enumerate(documents)}
    rated.sort(key=lambda row: place[row["document"]])
    rows = [{"text": r["text"], "label": "good" if r["rating"] > 0 else "bad"} for r in rated]
    parts, at = {}, 0
    for part in ("test", "valid", "train"):
        end = at + FILMS[part]
        while end < len(rated) and rated[end]["document"] == rated[end - 1]["document"]:
            end += 1
        parts[part], at = rows[at:end], end
    seen = {row["text"] for part in ("test", "valid") for row in parts[part]}
    write(folder, {**parts, "train": [row for row in parts["train"] if row["text"] not in seen]})


def write(folder: Path, parts: dict[str, Iterable[dict[str, Any]]]) -> None:
    """Writes every part as folder/PART.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = (json.dumps({k: v for k, v in row.items() if k != "id"}) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
