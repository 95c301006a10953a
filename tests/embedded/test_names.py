"""Questions with one right answer from the standard library: their parts, words and spellings."""

from __future__ import annotations

import pytest

from veneer.embedded import names
from veneer.embedded.texts import SPLITS, Document, heldout
from veneer.errors import DataError
from veneer.runs.texts import sources


def test_no_name_is_in_two_parts_and_answers_are_spelt_by_rule():
    parts = {s: names.pairs(s) for s in SPLITS}
    asked = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(asked) == len({*asked}) and len(parts["train"]) > 5 * len(parts["test"]) > 500
    for row in parts["test"]:
        name = row["prompt"].split('"')[1]
        camel = "".join(w[0].upper() + w[1:] for w in name.split("_"))
        assert row == {"prompt": f'camel_case("{name}") ==', "completion": f' "{camel}"'}


def test_the_test_asks_for_new_names_of_learned_words():
    words = {s: {w for row in names.pairs(s) for w in row["prompt"].split('"')[1].split("_")} for s in SPLITS}
    assert len(words["train"]) <= names.COMMON and words["test"] <= words["train"]


def test_words_are_those_of_most_names(monkeypatch):
    monkeypatch.setattr(names, "COMMON", 2)
    document = Document("a.py", "get_name get_file get_name_file set_up A_b get_x1 x_y get_get")
    assert names.names([document]) == ["get_file", "get_get", "get_name", "get_name_file", "set_up"]
    assert names.common(names.names([document])) == ["get_file", "get_get"]


def test_passages_of_the_test_are_of_modules_that_the_model_never_saw():
    train, test = (names.passages(s) for s in ("train", "test"))
    whole = {row["prompt"] + row["completion"] for row in train}
    assert len(train) > 200 and len(test) >= len(heldout()["test"])
    assert all(0 < len(text) <= names.PASSAGE for text in whole)
    assert all(row["completion"].startswith("\n") for row in (*train, *test))
    assert sum(row["prompt"] + row["completion"] in whole for row in test) < 0.1 * len(test)


def test_they_are_sources_of_pairs_by_part():
    for name in sources.ASKED:
        rows, named = (sources.rows([f"builtin:{name}{own}"], "valid") for own in ("", ":valid"))
        assert {row.kind for row in rows} == {"pair"}
        assert [row.columns for row in rows] == [row.columns for row in named] == sources.ASKED[name]("valid")
    with pytest.raises(DataError, match="the part of 'names' must be one of train, valid, test, got 'dev'"):
        sources.rows(["builtin:names:dev"], "train")
