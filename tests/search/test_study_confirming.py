"""The confirming part of the study: SmolLM2's page, protocol and claims, and a tiny form on real weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.models.short_names import SMOLLM2
from veneer.search.compare import contenders
from veneer.search.decide.halving import work
from veneer.search.study import claims, protocol, sources
from veneer.search.study import study as studying
from veneer.search.study.study import study
from veneer.tasks import Metric
from veneer.verbs.search.study import text

ROOT = Path(__file__).parents[2]


def test_the_protocol_of_the_confirming_part_says_the_settings(tmp_path):
    run, comparison = protocol.confirming(str(tmp_path))
    words = (ROOT / "docs" / "study" / "confirming.md").read_text(encoding="utf-8")
    assert f"{run.steps} steps of {run.batch} instructions, of at most {run.length} tokens" in words
    assert f"{comparison.seeds} seeds" in words and "make real KEYS=smollm2" in words
    trainings = work(comparison.rates) + comparison.seeds - 1 + sum(comparison.durations)
    assert f"about {trainings:g} trainings of {run.steps * run.batch} instructions" in words
    made = contenders.runs(run, comparison.methods)
    assert {comparison.centre[label] for label in made} == {1e-4, 1e-3, 2.5e-4}
    assert all(rate in words for rate in ("1e-4 for full fine-tuning", "1e-3 for LoRA", "2.5e-4 for LoRA+"))
    assert (tmp_path / SMOLLM2 / "texts" / "test.jsonl").is_file()


def test_every_claim_on_real_weights_can_be_judged_by_its_contenders():
    asked = [claim.words for claim in claims.CLAIMS if SMOLLM2 in claim.texts]
    row = {"values": [2.0, 2.01, 1.99], "lr": 1e-3, "front": [], "steps_to_reference": None}
    row |= {"measures": {"energy_rank": 90, "intruders": 5}}
    steps = {"mean": 9.0, "low": 8.0, "high": 10.0}
    rows = {label: {**row, "steps_to_reference": steps} for label in protocol.CONFIRMED}
    found = {v.claim: v for v in claims.judged({SMOLLM2: rows}, Metric("bpb", "bits per byte"))}
    assert list(found) == asked and len(asked) == 9
    judged = {claim for claim, v in found.items() if v.outcome != claims.UNKNOWN}
    assert judged == {*asked} - {"LoRA forgets less at equal learning"}, "its dial is measured, not planted"


def test_the_confirming_part_has_one_form(tmp_path):
    with pytest.raises(ConfigError, match="part smollm2 has one form; leave quick out"):
        study(str(tmp_path), quick=True, part=SMOLLM2)


@pytest.mark.real
def test_the_confirming_part_runs_on_real_weights_and_writes_a_page_of_its_own(real, tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_REAL", str(real(SMOLLM2).parent))
    few = {**protocol.CONFIRMING.comparison, "methods": (protocol.LOW, protocol.LORA), "seeds": 2}
    few["centre"] = dict.fromkeys(few["methods"], 0.016)  # two steps like it high: no rate lies on an edge
    (tmp_path / "known.py.txt").write_text("def area(side: float) -> float:\n    return side * side\n" * 2)
    own = {"steps": 2, "batch": 2, "known": (str(tmp_path / "known.py.txt"),)}
    size = protocol.Size({**protocol.CONFIRMING.run, **own}, few)
    monkeypatch.setattr(protocol, "CONFIRMING", size)
    monkeypatch.setattr(sources, "ROWS", {"train": 16, "valid": 4, "test": 4})
    out, to = tmp_path / "out", tmp_path / "docs"
    found = study(str(out), part=SMOLLM2, to=str(to), progress=False)
    assert found["parts"] == [SMOLLM2] and found["missing"] == [] and not found["quick"]
    page = (to / "smollm2.md").read_text(encoding="utf-8")
    assert "SmolLM2-135M-Instruct, real weights. [The protocol](confirming.md)" in page
    assert "| lora:rank=2 | " in page and (to / "smollm2-scores.png").is_file()
    assert text(found).endswith(f"page: {out}/smollm2.md")
    outcomes = {c["claim"]: c["outcome"] for c in found["claims"]}
    assert outcomes["LoRA learns less than full fine-tuning"] == claims.UNKNOWN  # without that contender
    rows = studying._rows(out / SMOLLM2)
    assert {row["score"]["n"] for row in rows.values()} == {2}
    assert all(row["measures"]["matrices"] == 210 for row in rows.values())
