"""Rows as other programs write them become messages; what does not fit is named. Expected messages are"
" written out by hand."""

from __future__ import annotations

import json

import pytest
from support import tiny

from veneer.data import row_files
from veneer.errors import DataError

PREFERENCES = (
    "'chosen' and 'rejected' hold preferences; use task='dpo', or set columns to"
    " prompt=..,completion=chosen to learn the chosen answers alone"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
ADD = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]


def said(*pairs: tuple[str, str]) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (
            {"instruction": "Add.", "input": "2 and 3", "output": "5", "id": 1},
            {"id": 1, "messages": said(("user", "Add.\n2 and 3"), ("assistant", "5"))},
        ),
        (
            {
                "instruction": "And 4?",
                "input": None,
                "output": "9",
                "system": "Be brief.",
                "history": [["2 and 3?", "5"]],
            },
            {
                "messages": said(
                    ("system", "Be brief."),
                    ("user", "2 and 3?"),
                    ("assistant", "5"),
                    ("user", "And 4?"),
                    ("assistant", "9"),
                )
            },
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "2 and 3?"},
                    {
                        "from": "function_call",
                        "value": '{"name": "add", "arguments": "{\\"a\\": 2, \\"b\\": 3}"}',
                    },
                    {"from": "observation", "value": "5"},
                    {"from": "gpt", "value": "Five."},
                ],
                "system": "Be brief.",
                "tools": json.dumps(ADD),
            },
            {
                "messages": [
                    *said(("system", "Be brief."), ("user", "2 and 3?")),
                    {"role": "assistant", "tool_calls": [CALL]},
                    *said(("tool", "5"), ("assistant", "Five.")),
                ],
                "tools": ADD,
            },
        ),
        (
            {"conversations": said(("user", "Hi"), ("assistant", "Ho"))},
            {"messages": said(("user", "Hi"), ("assistant", "Ho"))},
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"id": "x1", "function": {"name": "now"}}],
                    }
                ],
                "tools": None,
            },
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "x1", "type": "function", "function": {"name": "now", "arguments": {}}}
                        ],
                    }
                ]
            },
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    }
                ]
            },
            {"messages": said(("assistant", "ab"))},
        ),
        ({"messages": json.dumps(said(("assistant", "x")))}, {"messages": said(("assistant", "x"))}),
    ],
)
def test_rows_of_other_programs_become_messages(tmp_path, given, columns):
    (row,) = row_files.read_file(tiny.jsonl(tmp_path / "a.jsonl", given))
    assert (row.kind, row.columns) == ("messages", columns)
    assert row_files.unused([row]) == [c for c in given if c == "id"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instruction": "x"}, "column 'output' is missing, got 'instruction'"),
        (
            {"instruction": "x", "outptu": "y"},
            "column 'output' is missing, got 'instruction', 'outptu'; did you mean 'outptu'?",
        ),
        ({"instruction": "x", "output": 5}, "'output' must be text, got 5"),
        ({"instruction": "x", "output": "y", "input": 5}, "'input' must be text, got 5"),
        ({"instruction": "x", "output": "y", "system": 5}, "'system' must be text, got 5"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "'history' 1 must be a question and an answer, got [\"a\"]",
        ),
        ({"conversations": "x"}, "'conversations' must be a list of messages, got \"x\""),
        ({"conversations": [3]}, "message 1 must be an object with role and content, got 3"),
        ({"conversations": [{"from": "gpt"}]}, "message 1: 'value' must be text, got null"),
        (
            {"conversations": [{"from": "humn", "value": "x"}]},
            "message 1: unknown 'from' 'humn'; did you mean 'human'?",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "add"}]},
            "message 1: a call in 'tool_calls' lacks a function name",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "2, 3"}]}]},
            "message 1: the arguments of 'add' must be an object, got \"2, 3\"",
        ),
        (
            {"messages": said(("assistant", "x")), "tools": "add"},
            "'tools' must be a list of descriptions, got \"add\"",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
            "message 1 holds a part of type 'image'; this task learns from text alone",
        ),
        (
            {"messages": said(("user", "x")), "images": ["a.png"]},
            "'images' is not empty; this task learns from text alone",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
            "message 1: 'weight' must be 0, 1, false or true, got 0.5",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "mask": True}]},
            "message 1: unknown flag 'mask'; known: loss_weight, train, trainable, weight; rename or"
            " remove it",
        ),
        (
            {"prompt": "x", "completion": said(("assistant", "y"))},
            "'prompt' and 'completion' must both be texts or messages, got 'completion' as messages",
        ),
        ({"question": "x", "answer": 4}, "'answer' must be text, got 4"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, PREFERENCES),
        ({"messages": said(("assistant", "x")), "chosen": [], "rejected": []}, PREFERENCES),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "'input_ids' hold token ids; give the text itself"),
        (
            {"text": "x", "label": 1},
            "'label' beside 'text' is of another task (classification or KTO); to learn it as text, set"
            " columns to"
            " prompt=text,completion=label, else to text=text",
        ),
        (
            {"prompt": "x", "completion": "y", "label": True},
            "'label' beside 'completion' is of another task (classification or KTO); to learn it as text,"
            " set columns"
            " to prompt=text,completion=label, else to completion=completion",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, given, message):
    path = tiny.jsonl(tmp_path / "a.jsonl", given)
    with pytest.raises(DataError) as e:
        row_files.read_file(path)
    assert str(e.value) == f"{path} line 1: {message}"
