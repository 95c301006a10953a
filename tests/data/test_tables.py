"""Tables, datasets and weights: the same rows from every format, and what is said of those that cannot be
read."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from veneer.data import hub, repeats, row_files
from veneer.data.row_files import Row
from veneer.errors import DataError
from veneer.runs.texts import sources
from veneer.runs.texts.texts import named
from veneer.train.run import Run

pyarrow = pytest.importorskip("pyarrow")
ROWS = [{"prompt": "Q: a, b?", "completion": 'x "y"\nz'}, {"prompt": "ä", "completion": "\u2028"}]
CHAT = [
    {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "tool_calls": None},
        ],
        "tools": None,
    },
    {
        "messages": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": null}'}}],
            }
        ],
        "tools": '[{"type": "function"}]',
    },
]


def _csv(path: Path, rows: list[dict[str, str]], by: str = ",") -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=by)
        writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: list[dict[str, object]], streamed: bool = False) -> Path:
    from pyarrow import feather, ipc, parquet

    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(table, path)
    elif path.suffix == ".feather":
        feather.write_feather(table, path)
    elif path.suffix == ".arrow":
        with (ipc.new_stream if streamed else ipc.new_file)(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        _csv(path, rows, "\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize(
    ("name", "streamed"),
    [
        ("a.csv", 0),
        ("a.tsv", 0),
        ("a.json", 0),
        ("a.parquet", 0),
        ("a.feather", 0),
        ("a.arrow", 0),
        ("a.arrow", 1),
    ],
)
def test_every_format_has_the_same_rows(tmp_path, name, streamed):
    path = write(tmp_path / name, ROWS, bool(streamed))
    assert row_files.read_file(path) == [Row("pair", row, f"{path} row {n}") for n, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.arrow"])
def test_conversations_come_out_of_tables_without_what_is_null(tmp_path, name):
    one, two = row_files.read_file(write(tmp_path / name, CHAT))
    assert one.columns == {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    }
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    assert two.columns == {
        "messages": [{"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function"}],
    }


def test_calls_with_other_arguments_share_a_table(tmp_path):
    calls = [
        [{"function": {"name": "f", "arguments": arguments}}] for arguments in ({"a": 1}, {"b": {"c": "x"}})
    ]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": c}]} for c in calls]
    found = row_files.read_file(write(tmp_path / "a.parquet", rows))
    assert [r.columns["messages"][0]["tool_calls"][0]["function"]["arguments"] for r in found] == [
        {"a": 1},
        {"b": {"c": "x"}},
    ]


def test_a_field_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    (row,) = row_files.read_file(write(tmp_path / "a.csv", [{"text": "x" * 200_000}]))
    assert len(row.columns["text"]) == 200_000 and csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "prompt,completion\nx,y\nz\n",
            "FILE row 2: the row must have 2 fields, got 1; put fields with a separator or a line break in",
        ),
        ("a.csv", 'text\n"x\n', "FILE: unexpected end of data; double the quotes inside a quoted field"),
        (
            "a.csv",
            "text,text\nx,y\n",
            "FILE: column names must differ, got 'text' more than once; rename them in the first line",
        ),
        ("a.csv", "text\n", "FILE: the table has column names but no rows"),
        ("a.csv", "text\n\n\n", "FILE: the table has column names but no rows"),
        ("a.csv", "prompt;completion\nx;y\n", "FILE row 1: columns must be text, prompt and completion, "),
        ("a.json", '[{"text": "x"}]\n{"text": "y"}\n', "FILE line 2: not JSON at column 1 (Extra data)"),
        (
            "a.json",
            '{"train": []}',
            "FILE: must be a JSON list of objects, one a row, got a dict with 'train'",
        ),
        ("a.json", "[]", "FILE: must be a JSON list of objects, one a row, got a list without rows"),
        ("a.json", "[1]", "FILE row 1: must be a JSON object with columns, got a int"),
        ("a.parquet", "x", "FILE: unreadable as parquet ("),
        ("a.arrow", "x", "FILE: unreadable as arrow ("),
    ],
)
def test_tables_that_are_not_as_they_should_be_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as e:
        row_files.read_file(tmp_path / name)
    assert str(e.value).replace(str(tmp_path / name), "FILE").startswith(message)


def test_a_table_without_rows_is_refused(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": []}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the table has no rows"):
        row_files.read_file(tmp_path / "a.parquet")


# -- datasets ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(datasets, tmp_path_factory) -> Path:
    """A folder with one dataset, and one with three as splits."""
    place = tmp_path_factory.mktemp("saved")
    made = {
        name: datasets.Dataset.from_list([{"text": f"{name} {i}"} for i in range(3)])
        for name in ("train", "validation", "extra")
    }
    datasets.DatasetDict(made).save_to_disk(str(place / "splits"))
    made["train"].save_to_disk(str(place / "one"))
    return place


def texts_of(rows: list[Row]) -> list[str]:
    return [row.columns["text"] for row in rows]


def test_folders_of_datasets_are_read_by_split(saved):
    assert texts_of(sources.rows([str(saved / "one")], "valid")) == ["train 0", "train 1", "train 2"]
    folder = str(saved / "splits")
    assert (
        texts_of(sources.rows([folder], "train"))[0] == "train 0"
        and texts_of(sources.rows([folder], "valid"))[0] == "validation 0"
    )
    (first, *_) = sources.rows([f"{folder}:extra"], "train")
    assert first == Row("text", {"text": "extra 0"}, f"{folder}:extra row 1")


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("splits:trian", "train", "splits: unknown split 'trian'; did you mean 'train'?"),
        (
            "splits",
            "test",
            "splits: no split is named for test; choose one: FOLDER/splits:extra, FOLDER/splits:train,"
            " FOLDER/splits:va",
        ),
        ("one:train", "train", "one: the dataset has no splits; remove :train"),
    ],
)
def test_splits_that_are_not_there_are_refused(saved, name, part, message):
    with pytest.raises(DataError) as e:
        sources.rows([str(saved / name)], part)
    said = str(e.value).replace(str(saved), "FOLDER")
    head, _, listed = message.partition("choose one: ")
    assert said.startswith(f"FOLDER/{head}") and all(entry in said for entry in listed.split(", "))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("a/b", ("a/b", None, None)),
        ("a/b:test", ("a/b", None, "test")),
        ("a/b:train[:2]", ("a/b", None, "train[:2]")),
        ("a/b:main", ("a/b", "main", None)),
        ("a/b:main:extra[2:3]", ("a/b", "main", "extra[2:3]")),
    ],
)
def test_names_on_the_hub_may_say_configuration_and_split(datasets, saved, monkeypatch, name, asked):
    calls = []

    def load_dataset(path, config, split):
        calls.append((path, config, split))
        found = datasets.load_from_disk(str(saved / "splits"))
        return found["train"] if split else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of(sources.rows([name], "train"))[0] == "train 0" and calls == [asked]


def test_without_a_network_and_a_cache_a_name_is_refused(datasets, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError) as e:
        sources.rows(["veneer-nobody/nothing:train"], "train")
    said = str(e.value)
    assert said.startswith("veneer-nobody/nothing:train: not found on the Hugging Face hub or in its cache (")
    assert said.endswith("; no file or folder has that name either")


def test_a_missing_file_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "from_hub", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("gone/a.jsonl", "data/gone", "gone.txt"):
        with pytest.raises(DataError, match=f"{name}: the file does not exist"):
            sources.rows([name], "train")


# -- weights -------------------------------------------------------------------------------------------------


def test_a_weight_says_how_often_an_epoch_has_a_row():
    rows = [Row("text", {"text": str(i)}, f"row {i}") for i in range(10)]
    assert [r.times for r in repeats.weigh(rows, 1.0, 0)] == [1] * 10
    twice = repeats.weigh(rows, 2.3, 0)
    assert sorted(r.times for r in twice) == [2] * 7 + [3] * 3
    part = repeats.weigh(rows, 0.4, 0)
    assert len(part) == 4 and {r.times for r in part} == {1}
    turned = repeats.weigh(rows[::-1], 0.4, 0)  # by content, not by place
    assert (
        {r.where for r in turned} == {r.where for r in part} != {r.where for r in repeats.weigh(rows, 0.4, 1)}
    )


def test_sources_have_weights_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b@2").write_text("b")  # a file of that name is itself
    found = sources.rows([f"{tmp_path / 'a.txt'}@3", str(tmp_path / "b@2"), f"{tmp_path / 'b@2'}@2"], "train")
    assert [(r.columns["text"], r.times) for r in found] == [("a", 3), ("b", 1), ("b", 2)]
    with pytest.raises(DataError, match=r"a\.txt@0: weight must be above 0, got 0; leave the source out"):
        sources.rows([f"{tmp_path / 'a.txt'}@0"], "train")
    assert named(Run(data="builtin:prose@2")).valid == ("builtin:prose",)
