"""The record of first runs: what it counts, and the lists that docs/data.md has from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "bench" / "results" / "first_run.json").read_text(encoding="utf-8"))
MARKS = ("<!-- first_run: begin -->\n", "\n<!-- first_run: end -->")


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import first_run

    return first_run


def test_nothing_is_wrong():
    found = RECORD["figures"]
    assert found["formats_right"] == found["formats"] >= 20 and found["templates"] >= 28
    assert found["templates_wrong"] == 0
    assert found["templates_right"] + found["templates_refused_with_reason"] == 4 * found["templates"]


def test_the_figures_are_counts_of_the_record(bench):
    assert bench.figures(RECORD) == RECORD["figures"]
    worse = {**RECORD, "formats": {**RECORD["formats"], "alpaca": "wrong: the question is learned"}}
    assert bench.figures(worse)["formats_right"] == RECORD["figures"]["formats_right"] - 1


def test_the_lists_of_the_docs_are_the_records(bench):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert page.split(MARKS[0])[1].split(MARKS[1])[0] == bench.lists(RECORD)


@pytest.mark.parametrize(
    ("learned", "whole", "problem"),
    [
        (["Sum3 is 6"], False, ""),
        (["Say sum 3. Sum3 is 6"], True, ""),
        (["Say sum 3. Sum3 is 6"], False, "the question is learned"),
        (["Sum3 is 6"], True, "the question is not learned"),
        (["Say sum 3."], False, "no answer is learned: 'Say sum 3.'"),
    ],
)
def test_wrong_masks_are_noticed(bench, learned, whole, problem):
    rows = [{"where": "row", "tokens": [{"text": t, "learned": True} for t in learned]}]
    assert bench._unlearned(rows, [("Say sum 3.", "Sum3 is 6")], [], whole) == problem
    assert bench._unlearned(rows, [("Say sum 3.", "Sum3 is 6")], ["add"], whole) in (
        problem,
        "not learned: 'add'",
    )
