"""Names of special tokens in texts and pairs: read as tokens, spelt out or refused; shown before a run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from support import tiny

from veneer.cli import coloured_tokens
from veneer.data.chat import examples
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokens import encode
from veneer.errors import DataError
from veneer.models import pretrained
from veneer.tasks.text import special_names
from veneer.train.run import Run
from veneer.verbs.data.show import show

TEXT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"


@pytest.fixture
def by(monkeypatch) -> Any:
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    monkeypatch.setattr(pretrained, "processor", lambda name, kind: made)
    return made


def ids(row: Row, by: Any, special: bool) -> list[int]:
    (parts,) = examples(row, by, special=special)
    return encode(parts, by).ids.tolist()


@pytest.mark.parametrize(
    "row",
    [
        Row("text", {"text": TEXT}, ""),
        Row("pair", {"prompt": TEXT[:-16], "completion": TEXT[-16:]}, ""),
        Row("text", {"text": "<|end|>" + TEXT + "<|end|>"}, ""),
    ],
)
def test_names_are_read_as_tokens_or_spelt_out(by, row):
    start, end = by.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    read, spelt = ids(row, by, True), ids(row, by, False)
    assert (read.count(start), read.count(end)) == (2, 2) and (spelt.count(start), spelt.count(end)) == (0, 0)
    assert len(spelt) > len(read) + 20
    assert by.decode(read) == f"<|end|>{TEXT}<|end|>"
    # A text that spells its own beginning and end gets no second ones.
    assert (read[0], read[-1], read.count(by.eos_token_id)) == (by.bos_token_id, by.eos_token_id, 2)


def test_rows_that_spell_names_are_said(by):
    rows = [Row("text", {"text": TEXT}, "a.jsonl line 1"), Row("text", {"text": "plain"}, "a.jsonl line 2")]
    found = [
        sentence
        for reading in (Reading(), Reading(special_tokens="spell"), Reading(special_tokens="refuse"))
        for sentence in special_names.opening(
            {"train": rows[reading.special_tokens == "refuse" :]}, reading, by
        )
    ]
    are = "train: 1 of 2 rows spell special tokens (<|im_end|>, <|im_start|>), which are"
    assert found == [
        f"{are} read as these tokens; special_tokens='spell' changes that: a.jsonl line 1",
        f"{are} spelt out; special_tokens='parse' changes that: a.jsonl line 1",
    ]


@pytest.mark.parametrize(
    "row",
    [
        Row("text", {"text": TEXT}, "row 1"),
        Row("pair", {"prompt": "x", "completion": "y<|im_end|>"}, "row 1"),
        Row("messages", {"messages": [{"role": "user", "content": "<|im_end|>"}]}, "row 1"),
    ],
)
def test_rows_that_spell_names_can_be_refused(by, row):
    with pytest.raises(DataError) as e:
        special_names.opening({"train": [row]}, Reading(special_tokens="refuse"), by)
    assert str(e.value).startswith("train: 1 of 1 rows spell special tokens (<|im_end|>")
    assert str(e.value).endswith("row 1; remove them, or set special_tokens to parse or spell")


def test_show_makes_the_difference_visible(by, tmp_path):
    rows = ({"text": TEXT}, *({"text": f"x {i}"} for i in range(20)))
    data = str(tiny.jsonl(tmp_path / "a.jsonl", *rows))
    given = {"data": data, "valid": data, "known": "none", "length": 128}
    read, spelt = (show(Run(**given, special_tokens=how), 1) for how in ("parse", "spell"))
    assert read["rows"][0]["special"] == {"<|end|>": 2, "<|im_start|>": 2, "<|im_end|>": 2}
    assert read["rows"][0]["spelt"] == {} and spelt["rows"][0]["special"] == {"<|end|>": 2}
    assert spelt["rows"][0]["spelt"] == {"<|im_start|>": 2, "<|im_end|>": 2}
    said = "names of special tokens that are spelt out, not these tokens: <|im_start|> (2), <|im_end|> (2)"
    assert said in coloured_tokens.text(spelt, False) and said not in coloured_tokens.text(read, False)
