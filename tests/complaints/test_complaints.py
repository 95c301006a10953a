"""docs/complaints.md: every line has tests that exist, named after its first thread, or a reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "complaints.md"


def rows() -> list[list[str]]:
    """The cells of every line of the tables, without their heads."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if not line.startswith("| threads |")
    ]


def written() -> set[str]:
    """The names of all tests about complaints."""
    files = TESTS.rglob("test_complaints_*.py")
    return {
        name
        for f in files
        for name in re.findall(r"^def (test_\w+)\(", f.read_text(encoding="utf-8"), re.MULTILINE)
    }


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].split(",")[0])
def test_a_line_has_its_tests_or_a_reason(row):
    threads, there, here, tests = row
    assert threads and there and here
    names = re.findall(r"`(test_\w+)`", tests)
    if not names:
        assert re.fullmatch(r"none: .{20,}", tests), "neither a test nor a reason"
    assert set(names) <= written()
    number = re.search(r"\d+", threads)
    assert number and all(f"_{number[0]}_" in name for name in names)


def test_every_test_has_a_line_and_no_thread_has_two():
    named = [name for row in rows() for name in re.findall(r"`(test_\w+)`", row[3])]
    assert set(named) == written() and len(named) == len(set(named)) and len(rows()) == 57
    first = [row[0] for row in rows()]
    assert len(first) == len(set(first))
