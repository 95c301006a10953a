"""DPO on real pretrained weights: judgements of held-out pairs, beside what the model forgets of its text."""

from __future__ import annotations

import json

import pytest
from support import tiny

from veneer.runs.fit import fit
from veneer.train.run import Run

pytestmark = pytest.mark.real
SIDES = ("chosen", "rejected")
ASKED = "Write one sentence of a film review."


def pairs(path):
    """Sentences of film reviews that people rated: the good one is chosen, the bad one rejected."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    good = [r["text"] for r in rows if r["rating"] >= 1.5 and len(r["text"]) < 90]
    bad = [r["text"] for r in rows if r["rating"] <= -1.5 and len(r["text"]) < 90]
    user = {"role": "user", "content": ASKED}
    return [
        {side: [user, {"role": "assistant", "content": text}] for side, text in zip(SIDES, both, strict=True)}
        for both in zip(good, bad, strict=False)
    ]


def test_smollm2_learns_to_prefer_good_reviews(real, tmp_path):
    rows = pairs(real("vader") / "films.jsonl")[::4]
    tiny.jsonl(tmp_path / "data.jsonl", *rows[:48])
    tiny.jsonl(tmp_path / "valid.jsonl", *rows[48:72])
    (tmp_path / "known.txt").write_text(
        "The capital of France is Paris. Water boils at one hundred degrees. The sun rises in the east and"
        " sets in the west. A year has twelve months, and a week has seven days.\n" * 2,
        encoding="utf-8",
    )
    parts = {part: str(tmp_path / f"{part}.jsonl") for part in ("data", "valid")}
    settings = {"task": "dpo", "model": str(real("smollm2")), "known": str(tmp_path / "known.txt")}
    settings |= {"steps": 8, "batch": 6, "length": 96, "lr": 5e-4, "eval_every": 8, "eval_windows": 24}
    settings |= {"precision": "bf16", "device": "cpu", "report": False, "options": {"rank": 8}}
    fit(Run.from_dict({**settings, **parts, "out": str(tmp_path / "run")}), progress=False)
    lines = [line for line in tiny.metrics(tmp_path / "run") if "valid_accuracy" in line]
    first, last = lines[0], lines[-1]
    assert first["valid_accuracy"] == 0.5 and last["valid_accuracy"] > 0.65
    assert last["valid_loss"] < first["valid_loss"] and last["valid_margin"] > 0
    forgotten = last["known_bpb"] - first["known_bpb"]
    assert abs(forgotten) < 0.3 and last["known_bpb"] != first["known_bpb"]
