"""The page of proofs shows the figures that the bench recorded, all of them that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_pages_figures_are_the_recorded_ones():
    recorded = {}
    for bench in ("real", "senses"):
        text = (ROOT / "bench" / "results" / f"{bench}.json").read_text(encoding="utf-8")
        recorded |= json.loads(text)["figures"]
    page = (ROOT / "docs" / "proof.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| (-?[\d.]+) \|$", page, re.MULTILINE))
    assert {"minilm_lora", "smollm2_exact_lora", "wer_es_after", "vit_lora"} <= {*shown}
    for name, value in shown.items():
        assert float(value) == float(f"{recorded[name]:.4g}"), name


def test_lora_beats_the_floors():
    recorded = json.loads((ROOT / "bench" / "results" / "real.json").read_text(encoding="utf-8"))["figures"]
    assert recorded["minilm_lora"] > recorded["minilm_floor_tfidf"] > recorded["minilm_floor_majority"]
