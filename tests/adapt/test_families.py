"""Every family of docs/models.md: a small model learns, merges, is saved and opens elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
from support import families, families_page

PAGE = families_page.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_family_holds_what_its_row_says(name, tmp_path):
    if importlib.util.find_spec(families.FAMILIES[name].package) is None:
        pytest.skip(f"{families.FAMILIES[name].package} is not installed")
    row = families_page.row(name, tmp_path)
    assert row in PAGE.splitlines(), f"run python tests/support/families_page.py; the row is\n{row}"


def test_the_page_has_no_other_row():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "yes | equal" in line]
    assert len(rows) == len(families.FAMILIES)
