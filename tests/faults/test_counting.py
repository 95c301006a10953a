"""`make test-faults` counts every kind of fault that the tests inject, and fails if a pair differs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support import tally

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from faults import __main__ as command  # noqa: E402


def test_every_kind_of_fault_has_a_figure():
    texts = (p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    assert {kind for text in texts for kind in re.findall(r'tally\.one\("(\w+)"\)', text)} == set(
        command.FIGURES
    )


@pytest.mark.parametrize(("tried", "code"), [(3, 0), (4, 1)])
def test_the_line_has_both_numbers_of_a_pair(monkeypatch, capsys, tried, code):
    monkeypatch.setenv("VENEER_FAULTS", "")
    monkeypatch.setattr(command.pytest, "main", lambda arguments: 0)
    monkeypatch.setattr(tally, "TRIED", dict.fromkeys(command.FIGURES, tried))
    monkeypatch.setattr(tally, "RIGHT", dict.fromkeys(command.FIGURES, 3))
    assert command.main([]) == code
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["bench"] == "faults" and line["device"] and line["versions"]["torch"]
    assert (line["figures"]["kills"], line["figures"]["kills_identical"]) == (tried, 3)


def test_a_fault_that_ends_wrong_is_not_counted_as_right(monkeypatch):
    monkeypatch.setattr(tally, "TRIED", tally.Counter())
    monkeypatch.setattr(tally, "RIGHT", tally.Counter())
    with pytest.raises(AssertionError), tally.one("kills"):
        raise AssertionError
    with tally.one("kills"):
        pass
    assert (tally.TRIED["kills"], tally.RIGHT["kills"]) == (2, 1)
