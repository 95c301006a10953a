"""Kinds of trouble with real rows, three examples each: calls, flags, pairs of messages, files, lengths."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.objectives import causal_lm

from veneer.data import row_files, row_files_streamed
from veneer.data.chat import examples
from veneer.data.pack import IGNORED, n_bytes
from veneer.data.tokens import encode
from veneer.runs.texts import texts
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

CHATML = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "CALL {{ c.function.name }} WRITTEN"
    "{{ eos_token }}{% endfor %}{% else %}{{ m.role + ':' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def read(folder: Path, *rows: Any) -> list[row_files.Row]:
    return row_files.read_file(tiny.jsonl(folder / "rows.jsonl", *rows))


def learned(row: row_files.Row, template: str | None) -> tuple[str, str]:
    """Returns the row's text, and what is learned of it."""
    by = copy.deepcopy(tiny.tokenizer())
    by.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    by.chat_template = template
    whole, own = "", ""
    for parts in examples(row, by):
        found = encode(parts, by)
        whole, own = whole + by.decode(found.ids), own + by.decode(found.ids[found.learned])
    return whole, own


@pytest.mark.parametrize("arguments", [{"city": "Oslo", "n": 2}, json.dumps({"city": "Oslo", "n": 2})])
@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("{{ ' ' + c.function.arguments }}", '{"city": "Oslo", "n": 2}'),
        ("{{ c.function.arguments | tojson }}", '{"city": "Oslo", "n": 2}'),
        ("{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}", "city=Oslo n=2"),
    ],
    ids=["joins text", "tojson", "items of an object"],
)
def test_arguments_of_calls_take_the_form_that_the_template_wants(tmp_path, written, wanted, arguments):
    call = {"type": "function", "function": {"name": "sky", "arguments": arguments}}
    asked = {"role": "user", "content": "weather?"}
    (row,) = read(tmp_path, {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    _, own = learned(row, CALLS.replace("WRITTEN", written))
    assert wanted in own and "\\" not in own


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"trainable": 0}, {"loss_weight": 0.0}])
def test_a_turn_that_its_flag_excludes_is_context_only(tmp_path, off, template):
    wrong, right = {"role": "assistant", "content": "MISTAKE"}, {"role": "assistant", "content": "good"}
    (row,) = read(
        tmp_path,
        {"messages": [{"role": "user", "content": "Q"}, {**wrong, **off}, dict(wrong, role="user"), right]},
    )
    whole, own = learned(row, template)
    assert "MISTAKE" in whole and "MISTAKE" not in own and "good" in own


ASKED = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "the answer"}


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"prompt": [{"role": "system", "content": "S"}, ASKED], "completion": json.dumps([ANSWER])},
        {"prompt": [ASKED, {"role": "assistant", "content": "first"}, ASKED], "completion": [ANSWER]},
    ],
    ids=["one turn each", "JSON text", "an answer within the prompt"],
)
def test_the_completions_turns_alone_are_learned_of_pairs_of_messages(tmp_path, given):
    (row,) = read(tmp_path, given)
    whole, own = learned(row, CHATML)
    assert (
        "the answer" in own and "Q" in whole and not {"Q", "S", "first"} & {*own.replace("\n", " ").split()}
    )
    assert "Q" not in own and "first" not in own


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '[\n {"text": "a b"},\n {"text": "c d"}\n]'),
        ("a.jsonl", '[{"text": "a b"}, {"text": "c d"}]'),
        ("a.json", '{"text": "a b"}\n{"text": "c d"}\n'),
    ],
    ids=["a list over lines", "a list in a line", "lines named json"],
)
def test_lists_and_lines_are_told_apart_by_their_content(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert [row.columns["text"] for row in row_files.read_file(tmp_path / name)] == ["a b", "c d"]


def rows_of(kind: str) -> list[dict[str, Any]]:
    draw = random.Random(0)

    def say(low: int, high: int) -> str:
        return " ".join(draw.choices(tiny.WORDS, k=draw.randint(low, high)))

    found: list[dict[str, Any]] = []
    for _ in range(200):
        asked, answer = say(2, 9), say(3, 20)
        talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        found.append(
            {"pairs": {"prompt": asked, "completion": f" {answer}"}, "conversations": {"messages": talk},
             "alpaca": {"instruction": asked, "input": "", "output": answer},
             "texts": {"text": f"{asked}. {answer}. " * draw.randint(1, 99)}}[kind]
        )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["pairs", "conversations", "alpaca", "texts"])
def test_the_measured_text_depends_on_neither_length_nor_packing(tmp_path, kind):
    path = str(tiny.jsonl(tmp_path / "rows.jsonl", *rows_of(kind)))
    seen = set()
    for length, packing in ((100, True), (128, True), (256, True), (256, False), (700, True), (1024, True)):
        run = Run(data=path, valid=path, known="none", length=length, packing=packing, eval_windows=4)
        task = causal_lm(tiny.tokenizer(), length=length, packing=packing)
        found = {"valid": texts.prepare(texts.read(run, ["valid"])["valid"], task, Notes(), "valid")}
        measured = texts.evaluated(found, run, task)["valid"]
        labels = torch.cat([s.labels for w in measured for s in w])
        seen.add((n_bytes(measured), *labels[labels != IGNORED].sort().values.tolist()))
        assert n_bytes(measured) < n_bytes(found["valid"].examples)
    assert len(seen) == 1


HALF = "\ud83d"
CALLED = {"type": "function", "function": {"name": "sky", "arguments": json.dumps({"city": f"Os{HALF}lo"})}}


@pytest.mark.parametrize(
    "given",
    [
        {"text": f"cut in two {HALF} here"},
        {"messages": [ASKED, {"role": "assistant", "content": f"\ude00 low half first {HALF}"}]},
        {"instruction": "Q", "input": f"{HALF}", "output": f"the answer {HALF}\ude00{HALF}"},
        {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALLED]}]},
    ],
    ids=["a text", "a low half", "columns", "JSON text within a call"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_halves_of_surrogate_pairs_reach_the_tokenizer_as_replacement_characters(tmp_path, given, streamed):
    path = tiny.jsonl(tmp_path / "rows.jsonl", given)
    (row,) = row_files_streamed.stream_file(path) if streamed else row_files.read_file(path)
    template = CALLS.replace("WRITTEN", "{{ c.function.arguments.city }}")
    whole, own = learned(row, template)
    assert "\ufffd" in own and not any("\ud800" <= letter <= "\udfff" for letter in whole)
