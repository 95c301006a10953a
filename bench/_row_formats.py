"""Row formats of well-known public sets, rebuilt by hand: the shape of each, filled with small sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]

SUM = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
TOOL = {"type": "function", "function": SUM}


class Format(NamedTuple):
    """row(question, answer): a row of the set. settings: of the reading; whole: all of it is learned."""

    name: str
    row: Callable[[str, str], Row]
    settings: Mapping[str, Any] = {}
    whole: bool = False


def said(*turns: tuple[str, str]) -> list[Row]:
    """Returns turns as messages of role and content."""
    return [{"role": role, "content": content} for role, content in turns]


def shared(*turns: tuple[str, str]) -> list[Row]:
    """Returns turns as ShareGPT writes them."""
    return [{"from": speaker, "value": value} for speaker, value in turns]


def _call(answer: str, arguments: Any) -> Row:
    """Returns the turn that calls the tool; the answer is one of its arguments."""
    given = {"a": answer, "b": 0}
    function = {"name": "add", "arguments": json.dumps(given) if arguments is str else given}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }


BRIEF = "You are brief."
OTHER = ("And before that?", "Nothing at all.")

FORMATS = [
    Format("alpaca", lambda q, a: {"instruction": q, "input": "", "output": a, "text": f"Below .. {q} {a}"}),
    Format("code alpaca, its input used", lambda q, a: {"instruction": "Answer.", "input": q, "output": a}),
    Format("LLaMA-Factory's alpaca", lambda q, a: {
        "instruction": q, "input": "", "output": a, "system": BRIEF, "history": [list(OTHER)]}),
    Format("dolly", lambda q, a: {"instruction": q, "context": "Sums.", "response": a, "category": "qa"}),
    Format("openorca", lambda q, a: {"id": "flan.1", "system_prompt": BRIEF, "question": q, "response": a}),
    Format("GSM8K", lambda q, a: {"question": q, "answer": f"{a}\n#### 4"}),
    Format("MetaMathQA", lambda q, a: {
        "type": "GSM_Rephrased", "query": q, "original_question": "?", "response": a}),
    Format("NuminaMath", lambda q, a: {
        "source": "olympiads", "problem": q, "solution": a, "messages": said(("user", q), ("assistant", a))}),
    Format("MATH", lambda q, a: {"problem": q, "level": "Level 5", "type": "Algebra", "solution": a}),
    Format("GPT4All", lambda q, a: {"prompt": q, "response": a, "source": "x"}),
    Format("FLAN", lambda q, a: {"inputs": q, "targets": a, "task": "sums"}),
    Format("xLAM function calls", lambda q, a: {
        "id": 1, "query": q, "tools": json.dumps([SUM]),
        "answers": json.dumps([{"name": "add", "arguments": {"a": a, "b": 0}}])}),
    Format("ShareGPT", lambda q, a: {"id": "1", "conversations": shared(("human", q), ("gpt", a))}),
    Format("ShareGPT with function calls", lambda q, a: {
        "conversations": shared(
            ("human", q), ("function_call", json.dumps({"name": "add", "arguments": {"a": a}}))),
        "system": BRIEF, "tools": json.dumps([SUM])}),
    Format("OpenHermes", lambda q, a: {
        "conversations": shared(("system", BRIEF), ("human", q), ("gpt", a)), "source": "x",
        "category": None}),
    Format("OpenChat, weights", lambda q, a: {"conversations": [
        {"from": "human", "value": q, "weight": 0.0}, {"from": "gpt", "value": a, "weight": 1.0}]}),
    Format("LIMA", lambda q, a: {"conversations": [q, a], "source": "x"}),
    Format("LMSYS-Chat", lambda q, a: {
        "conversation_id": "1", "model": "m", "turn": 1,
        "conversation": said(("user", q), ("assistant", a))}),
    Format("UltraChat", lambda q, a: {
        "prompt": q, "prompt_id": "1", "messages": said(("user", q), ("assistant", a))}),
    Format("OpenAI fine-tuning", lambda q, a: {
        "messages": said(("system", BRIEF), ("user", q), ("assistant", a))}),
    Format("OpenAI fine-tuning, weights", lambda q, a: {"messages": [
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": q, "weight": 0},
        *said(("user", "Better."), ("assistant", a))]}),
    Format("OpenAI fine-tuning, tools", lambda q, a: {
        "messages": [*said(("user", q)), _call(a, str)], "tools": [TOOL], "parallel_tool_calls": False}),
    Format("content in parts", lambda q, a: {"messages": [
        {"role": "user", "content": [{"type": "text", "text": q}]},
        {"role": "assistant", "content": [{"type": "text", "text": a}]}]}),
    Format("TRL, language modelling", lambda q, a: {"text": f"{q} {a}"}, whole=True),
    Format("TRL, pairs", lambda q, a: {"prompt": q, "completion": f" {a}"}),
    Format("TRL, pairs of messages", lambda q, a: {
        "prompt": said(("user", q)), "completion": said(("assistant", a))}),
    Format("a text with a chat template applied", lambda q, a: {
        "text": f"<|end|>{q}<|end|>{a}<|end|>"}, whole=True),
    Format("Banking77", lambda q, a: {"text": q, "label": a},
           {"columns": {"prompt": "text", "completion": "label"}}),
    Format("SQuAD", lambda q, a: {
        "id": "1", "title": "T", "context": "Sums.", "question": q,
        "answers": {"text": [a], "answer_start": [0]}},
        {"columns": {"completion": "answers.text.0"}, "prompt_template": "{context}\n\nQ: {question}\nA:"}),
    Format("OPUS translations", lambda q, a: {"id": "1", "translation": {"en": q, "fr": a}},
           {"columns": {"prompt": "translation.en", "completion": "translation.fr"}}),
    Format("XSum", lambda q, a: {"document": q, "summary": a, "id": "1"},
           {"columns": {"prompt": "document", "completion": "summary"}}),
    Format("The Stack", lambda q, a: {"content": f"# {q}\n{a}", "lang": "Python", "size": 9},
           {"columns": {"text": "content"}}, whole=True),
    Format("UltraFeedback, its chosen answers", lambda q, a: {"prompt": q, "chosen": a, "rejected": "No."},
           {"columns": {"prompt": "prompt", "completion": "chosen"}}),
]  # fmt: skip
