"""Folders of files, and data sets that LLaMA-Factory's dataset_info.json names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import tiny

from veneer.data.forms.shape import Shape
from veneer.errors import DataError
from veneer.runs.texts import sources

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def texts_in(names: str, part: str = "train", **more: Any) -> list[str]:
    rows = sources.rows([names], part, **more)
    assert [row.columns for row in sources.stream(names, part)] == [row.columns for row in rows]
    return [row.columns["text"] for row in rows]


def written(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.jsonl(path, {"text": name}) if path.suffix == ".jsonl" else path.write_text(
            name, encoding="utf-8"
        )
    return str(folder)


def test_a_folder_is_read_by_name(tmp_path):
    names = ["b.jsonl", "a.jsonl", "sub/c.jsonl", "README.md", ".hidden.jsonl", "notes.bin"]
    assert texts_in(written(tmp_path, names)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_texts_of_a_folder_are_read_where_it_has_no_rows(tmp_path):
    assert texts_in(written(tmp_path, ["b.txt", "a.md", "c.py"])) == ["a.md", "b.txt"]


def test_files_of_a_folder_belong_to_the_part_that_their_name_says(tmp_path):
    folder = written(tmp_path, ["train.jsonl", "valid-0.jsonl", "test/a.jsonl", "trainer.jsonl"])
    assert [texts_in(folder, part) for part in ("train", "valid", "test")] == [
        ["train.jsonl"], ["valid-0.jsonl"], ["test/a.jsonl"]
    ]  # fmt: skip
    other = written(tmp_path / "more", ["a.jsonl", "val.jsonl"])
    assert texts_in(other) == ["a.jsonl"] and texts_in(other, "valid") == ["val.jsonl"]
    with pytest.raises(
        DataError, match=r"more: the folder has no files for test, got valid; name files instead$"
    ):
        sources.rows([other], "test")


def test_a_folder_without_readable_files_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder must hold .*\.jsonl.* files, got a\.bin$"):
        sources.rows([written(tmp_path, ["a.bin"])], "train")


INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "query": "more", "response": "tell"}},
    "plain": {"file_name": "plain.json", "num_samples": 2},
    "talk": {
        "file_name": "talk.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "you"},
    },
    "openai": {
        "file_name": "openai.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "ranked": {"file_name": "x.json", "ranking": True, "columns": {"chosen": "a", "rejected": "b"}},
    "script": {"script_url": "x"},
    "odd": {"file_name": "x.json", "columns": {"promt": "a"}},
}


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    (tmp_path / "mine.json").write_text(json.dumps([{"ask": "Q", "more": "M", "tell": "A", "output": "no"}]))
    (tmp_path / "plain.json").write_text(
        json.dumps([{"instruction": f"{i}", "output": "A"} for i in range(5)])
    )
    tiny.jsonl(
        tmp_path / "talk.jsonl",
        {"turns": [{"who": "me", "what": "Q"}, {"who": "you", "what": "A"}], "rules": "S"},
    )
    tiny.jsonl(tmp_path / "openai.jsonl", {"messages": TURNS})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("mine", [{"role": "user", "content": "Q\nM"}, TURNS[1]]),
        ("talk", [{"role": "system", "content": "S"}, *TURNS]),
        ("openai", TURNS),
    ],
)
def test_a_listed_data_set_is_read_by_its_columns_and_tags(listed, name, messages):
    for source in (f"{listed}:{name}", f"{listed}/dataset_info.json:{name}"):
        (row,) = sources.rows([source], "train")
        assert row.columns["messages"] == messages
        if name != "mine":  # a .json cannot be streamed
            assert [r.columns for r in sources.stream(source, "train")] == [row.columns]


def test_a_listed_data_set_may_be_a_sample(listed):
    found = sources.rows([f"{listed}:plain@2"], "train", seed=1)
    assert len(found) == 2 and {row.times for row in found} == {2}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mien", "unknown data set 'mien'; did you mean 'mine'?"),
        ("ranked", "ranked: chosen, rejected, ranking hold judged answers; use task 'dpo' or 'kto'"),
        ("script", "script: unsupported entries script_url"),
        ("odd", "odd: unknown columns or tags 'promt'; did you mean 'prompt'?"),
    ],
)
def test_entries_that_cannot_be_read_are_named(listed, name, message):
    with pytest.raises(DataError) as e:
        sources.rows([f"{listed}:{name}"], "train")
    assert str(e.value) == f"{listed}/dataset_info.json: {message}"


def test_listed_columns_cannot_be_named_again(listed):
    with pytest.raises(
        DataError, match=r"dataset_info\.json names the columns already; leave columns and prompt_template"
    ):
        sources.rows([f"{listed}:mine"], "train", shape=Shape({"text": "ask"}))
