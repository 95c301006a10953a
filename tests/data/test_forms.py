"""The columns of well-known data sets, of other trainers and of files a user names; expected rows are"
" written by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support import tiny

from veneer.data import row_files, row_files_streamed
from veneer.data.forms.shape import Shape, problems
from veneer.errors import DataError, in_python

CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


ASKED = said(("user", "Q"), ("assistant", "A"))
SYSTEM = said(("system", "S"))


@pytest.mark.parametrize(
    ("given", "kind", "columns"),
    [
        pytest.param(
            {"instruction": "Q", "input": "", "output": "A", "text": "Below is .."},
            "messages",
            {"messages": ASKED, "text": "Below is .."},
            id="alpaca with its text",
        ),
        pytest.param(
            {"instruction": "Q", "context": "C", "response": "A", "category": "qa"},
            "messages",
            {"messages": said(("user", "Q\n\nC"), ("assistant", "A")), "category": "qa"},
            id="dolly",
        ),
        pytest.param(
            {"id": "1", "system_prompt": "S", "question": "Q", "response": "A"},
            "messages",
            {"id": "1", "messages": SYSTEM + ASKED},
            id="openorca",
        ),
        pytest.param({"question": "Q", "answer": "A"}, "messages", {"messages": ASKED}, id="gsm8k"),
        pytest.param(
            {"type": "GSM_Rephrased", "query": "Q", "original_question": "O", "response": "A"},
            "messages",
            {"type": "GSM_Rephrased", "original_question": "O", "messages": ASKED},
            id="metamath",
        ),
        pytest.param(
            {"source": "olympiads", "problem": "Q", "solution": "A", "messages": ASKED},
            "messages",
            {"source": "olympiads", "problem": "Q", "solution": "A", "messages": ASKED},
            id="numina",
        ),
        pytest.param(
            {"problem": "Q", "level": "5", "solution": "A"},
            "messages",
            {"level": "5", "messages": ASKED},
            id="math",
        ),
        pytest.param(
            {"prompt": "Q", "response": "A", "source": "x"},
            "messages",
            {"source": "x", "messages": ASKED},
            id="gpt4all",
        ),
        pytest.param(
            {"inputs": "Q", "targets": "A", "task": "t"},
            "pair",
            {"task": "t", "prompt": "Q", "completion": "A"},
            id="flan",
        ),
        pytest.param(
            {
                "query": "Q",
                "tools": json.dumps([TOOL["function"]]),
                "answers": json.dumps([{"name": "sky", "arguments": {"city": "Oslo"}}]),
            },
            "messages",
            {"messages": [*ASKED[:1], {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
            id="xlam",
        ),
        pytest.param(
            {"id": "1", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "messages",
            {"id": "1", "messages": ASKED},
            id="sharegpt",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "Q", "weight": 0},
                    {"from": "gpt", "value": "A", "weight": 1},
                ]
            },
            "messages",
            {"messages": [{**ASKED[0], "weight": 0}, {**ASKED[1], "weight": 1}]},
            id="openchat",
        ),
        pytest.param(
            {"conversations": ["Q", "A"], "source": "x"},
            "messages",
            {"messages": ASKED, "source": "x"},
            id="lima",
        ),
        pytest.param(
            {"conversation": ASKED, "model": "m"}, "messages", {"messages": ASKED, "model": "m"}, id="lmsys"
        ),
        pytest.param(
            {"prompt": "Q", "prompt_id": "1", "messages": ASKED},
            "messages",
            {"prompt": "Q", "prompt_id": "1", "messages": ASKED},
            id="ultrachat",
        ),
        pytest.param(
            {"messages": [*ASKED[:1], {"role": "assistant", "content": "A", "weight": 0}, *ASKED]},
            "messages",
            {"messages": [*ASKED[:1], {"role": "assistant", "content": "A", "weight": 0}, *ASKED]},
            id="openai",
        ),
        pytest.param(
            {"prompt": "Q", "completion": "A"}, "pair", {"prompt": "Q", "completion": "A"}, id="trl pair"
        ),
        pytest.param(
            {"prompt": [*ASKED, *ASKED[:1]], "completion": ASKED[1:], "id": 3},
            "messages",
            {"messages": [ASKED[0], {**ASKED[1], "train": False}, *ASKED], "id": 3},
            id="trl conversational pair",
        ),
        pytest.param(
            {"prompt": '["a", "list"]', "completion": "{}"},
            "pair",
            {"prompt": '["a", "list"]', "completion": "{}"},
            id="a pair of JSON texts",
        ),
        pytest.param({"text": "T", "meta": {}}, "text", {"text": "T", "meta": {}}, id="text"),
    ],
)
def test_rows_of_well_known_sets(tmp_path, given, kind, columns):
    path = tiny.jsonl(tmp_path / "a.jsonl", given)
    (row,) = row_files.read_file(path)
    assert (row.kind, row.columns) == (kind, columns)
    assert list(row_files_streamed.stream_file(path)) == [row]
    assert not {"prompt", "completion", "messages", "tools"} & {*row_files.unused([row])} or kind != "pair"


@pytest.mark.parametrize(
    "given",
    [
        {"text": ""},
        {"text": None},
        {"prompt": "Q", "completion": ""},
        {"prompt": "Q", "completion": None},
        {"prompt": ASKED[:1], "completion": []},
        {"messages": []},
        {"messages": None},
        {"messages": ASKED[:1]},
        {"conversations": [{"from": "human", "value": "Q"}]},
        {"instruction": "Q", "output": "", "history": [["a", "b"]]},
        {"question": "Q", "answer": ""},
        {"inputs": "Q", "targets": None},
    ],
)
def test_rows_without_anything_to_learn_are_empty(tmp_path, given):
    (row,) = row_files.read_file(tiny.jsonl(tmp_path / "a.jsonl", given))
    assert row.kind == "empty"


@pytest.mark.parametrize(
    ("shape", "given", "kind", "columns"),
    [
        (
            Shape({"prompt": "text", "completion": "label"}),
            {"text": "Q", "label": 3, "id": 1},
            "pair",
            {"prompt": "Q", "completion": "3", "id": 1},
        ),
        (Shape({"text": "text"}), {"text": "Q", "label": 3}, "text", {"text": "Q", "label": 3}),
        (
            Shape({"prompt": "prompt", "completion": "chosen"}),
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
            "pair",
            {"prompt": "Q", "completion": "A", "rejected": "B"},
        ),
        (Shape({"messages": "data.turns"}), {"data": {"turns": ASKED}}, "messages", {"messages": ASKED}),
        (
            Shape({"prompt": "question", "completion": "answers.text.0"}),
            {"question": "Q", "answers": {"text": ["A", "a"]}, "text": "T"},
            "pair",
            {"prompt": "Q", "completion": "A"},
        ),
        (
            Shape({"completion": "answer"}, "{context}\n\nQ: {question} {{x}}\nA:"),
            {"context": "C", "question": "Q", "answer": " A"},
            "pair",
            {"prompt": "C\n\nQ: Q {x}\nA:", "completion": " A"},
        ),
        (
            Shape({}, "{a.b}={n}:"),
            {"a": {"b": "c"}, "n": 4, "completion": "5"},
            "pair",
            {"prompt": "c=4:", "completion": "5"},
        ),
    ],
)
def test_columns_are_named_by_the_user(tmp_path, shape, given, kind, columns):
    path = tiny.jsonl(tmp_path / "a.jsonl", given)
    (row,) = row_files.read_file(path, shape)
    assert (row.kind, row.columns) == (
        kind,
        {**columns, **{n: v for n, v in row.columns.items() if n in ("data", "answers", "a")}},
    )
    assert list(row_files_streamed.stream_file(path, shape)) == [row]


def test_a_named_column_that_is_missing_is_said(tmp_path):
    path = tiny.jsonl(tmp_path / "a.jsonl", {"question": "Q", "answer": "A"})
    with pytest.raises(DataError) as e:
        row_files.read_file(path, Shape({"prompt": "qestion", "completion": "answer"}))
    message = "column 'qestion' (named by columns or prompt_template) is missing, got 'question', 'answer'"
    assert str(e.value) == f"{path} line 1: {message}"


@pytest.mark.parametrize(
    ("columns", "template", "message"),
    [
        (
            {"prmpt": "x"},
            "",
            "columns must set text, prompt, completion, messages, tools, conversations, system,",
        ),
        ({}, "Q: {", "prompt_template must be text with {column} in it: Single '{' encountered"),
        ({}, "no column", "prompt_template must name columns as {column}, got 'no column'"),
        ({}, "{} {0!r}", "prompt_template must name columns as {column}, got '{} {0!r}'"),
        ({"prompt": "x"}, "{y}", "prompt_template writes the prompt, so columns cannot set it too"),
    ],
)
def test_unsuitable_shapes_are_said(columns, template, message):
    (problem,) = problems(columns, template)
    assert in_python(problem).startswith(message)


def test_a_json_list_named_jsonl_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1), encoding="utf-8")
    assert [(r.columns["text"], r.where) for r in row_files.read_file(path)] == [
        ("a", f"{path} row 1"), ("b", f"{path} row 2")
    ]  # fmt: skip
    with pytest.raises(DataError, match="a JSON list cannot be streamed; write one object a line"):
        list(row_files_streamed.stream_file(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path, name):
    r"""trl and transformers reports: "\ud83d" alone is no character, and no tokenizer takes it."""
    rows = [{"text": "cut \ud83d here"}, {"text": "whole \ud83d\ude00 one"}, {"text": "\\ud83d is spelt"}]
    written = "\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows)
    (tmp_path / name).write_text(written, encoding="utf-8")
    found = [r.columns["text"] for r in row_files.read_file(tmp_path / name)]
    assert found == ["cut \ufffd here", "whole \U0001f600 one", "\\ud83d is spelt"]
    for text in found:
        tiny.tokenizer()(text)
