"""Sentences and lines follow the rules of CONTRIBUTING; left/ lists exceptions, which only shrink."""

from __future__ import annotations

import pytest
from support import wording

LEFT = wording.listed()


@pytest.fixture(scope="module")
def now():
    return wording.counted(wording.look_over())


@pytest.mark.parametrize("kind", ["sentences", "columns", "function", "file", "folder"])
def test_no_place_breaks_a_rule_beyond_its_entry(now, kind):
    grown = {
        p: (n, LEFT.get((k, p), 0)) for (k, p), n in now.items() if k == kind and n > LEFT.get((k, p), 0)
    }
    assert grown == {}, "place: (found, allowed); `python tests/support/wording.py PLACE` prints the findings"


def test_mended_places_are_off_the_lists(now):
    mended = sorted(place for kind, place in LEFT if (kind, place) not in now)
    assert mended == [], "run `python tests/support/wording.py --shrink` and commit the shorter lists"


@pytest.mark.parametrize(
    "source",
    [
        '"""What a step takes."""',
        'def f():\n    """Whether x is y."""',
        'class C:\n    """Those that act."""',
        '"""Returns x."""\nraise ValueError("rank 3.5 is no whole number")',
        'f"the layer {x} is told"',
        "# The base is left\n# as it is.",
        "# What is left.",
    ],
)
def test_forbidden_sentences_are_found(source):
    assert len(list(wording.sentences("src/a.py", source))) == 1


def test_plain_sentences_are_not_found():
    source = (
        '"""Returns the rank, which is no longer than what its base has."""\n# It is just as it is there.\n'
    )
    assert list(wording.sentences("src/a.py", source)) == []
    assert list(wording.prose("a.md", "```\nit is no rank\n```\n")) == []


def test_a_phrase_in_prose_is_found_on_its_line():
    assert [f.line for f in wording.prose("a.md", "Fine.\n\nIt is\nno rank.\n")] == [3]


def test_wide_lines_are_found():
    wide = "x" * 111
    assert [f.line for f in wording.columns("a.py", f"x\n{wide}\n{wide[:110]}")] == [2]
    assert list(wording.columns("a.md", f"| {wide} |\nhttps://example.org/{wide}")) == []
    assert len(list(wording.columns("a.py", f"| {wide} |"))) == 1


def test_long_functions_and_files_are_found():
    body = "    x = 1\n"
    assert [f.place for f in wording.sizes("a.py", f"class C:\n  def f():\n{body * 40}")] == ["a.py::C.f"]
    assert list(wording.sizes("a.py", f"def f():\n{body * 39}")) == []
    assert [(f.kind, f.count) for f in wording.sizes("a.py", "\n" * 251)] == [("file", 251)]
