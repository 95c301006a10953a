"""The chat templates of the installed trl package: masks of the originals are those of their marked twins."""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from veneer.data.chat import serving, turns
from veneer.data.chat.rendering import Conversation
from veneer.data.row_files import Row
from veneer.errors import DataError

SPEC = find_spec("trl")
FOLDER = Path(SPEC.origin).parent / "chat_templates" if SPEC and SPEC.origin else Path("trl is not installed")
TWIN = "_training"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith(TWIN))
SPECIAL = re.compile(
    r"<\|[^|<>\s{}']+\|>|<｜[^｜<>{}']+｜>|\[/?(?:INST|TOOL_[A-Z]+|AVAILABLE_TOOLS)\]|<(?:start|end)_of_turn>"
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|return|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|endoftext|>",
    "<|eot|>",
)
# A twin that differs by purpose: it does not learn the token by which the original asks for a tool's result.
OTHER = {("diffusion_gemma", "tools")}

CITY = {"city": {"type": "string", "description": "A city."}}
PARAMETERS = {"type": "object", "properties": CITY, "required": ["city"]}
SKY = {"name": "get_sky", "description": "Tells the sky.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": SKY}
CALL = {
    "type": "function",
    "id": "call_1x2y3",
    "function": {"name": "get_sky", "arguments": {"city": "Oslo"}},
}
A, B, C = ("user", "What is 2 + 2?"), ("user", "And 3 + 3?"), ("user", "How is the sky?")
RESULT = {"role": "tool", "name": "get_sky", "tool_call_id": "call_1x2y3", "content": "Clear."}
TALKS: dict[str, list[Any]] = {
    "one turn": [A, ("assistant", "It is four.")],
    "turns": [A, ("assistant", "It is four."), B, ("assistant", "Six.")],
    "thinking": [
        A,
        ("assistant", "<think>\nTwo pairs.\n</think>\n\nIt is four."),
        B,
        ("assistant", "<think>\nDouble three.\n</think>\n\nSix."),
    ],
    "tools": [
        C,
        {"role": "assistant", "tool_calls": [CALL]},
        RESULT,
        ("assistant", "Blue."),
        ("user", "Thanks!"),
        ("assistant", "Welcome."),
    ],
}


def row(kind: str) -> Row:
    messages = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in TALKS[kind]]
    tools = {"tools": [TOOL]} if kind == "tools" else {}
    return Row("messages", {"messages": messages, **tools}, "row 1")


def by(name: str) -> Any:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    own = (FOLDER / f"{name.removesuffix(TWIN)}.jinja").read_text(encoding="utf-8")
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(own)))})
    made.add_special_tokens(
        {"eos_token": next((e for e in ENDS if e in own), tiny.END), "bos_token": "<BOS>"}
    )
    made.chat_template = template
    return made


def learned(text: str, spans: list[tuple[int, int]], first: int) -> set[int]:
    """Returns the places of learned characters from `first` on, without white space: twins differ in it."""
    return {i for a, b in spans for i in range(max(a, first), b) if not text[i].isspace()}


@pytest.mark.skipif(not NAMES, reason="trl is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_a_single_turn_is_learned(name):
    talk = Conversation(row("one turn"), by(name))
    (found,) = serving.examples(talk, [1])
    assert "four" in found.text[found.prompt :] and "2 + 2" not in found.text[found.prompt :]
    assert found.spans


@pytest.mark.parametrize("kind", TALKS)
@pytest.mark.parametrize("name", [n for n in NAMES if (FOLDER / f"{n}{TWIN}.jinja").is_file()])
def test_masks_are_those_of_the_twin_where_both_render_the_same(name, kind):
    given, n = row(kind), len(TALKS[kind])
    try:
        talk = Conversation(given, by(name))
        found = serving.examples(talk, turns.chosen(given.columns["messages"], ["assistant"]))
    except DataError as e:
        refused = any(
            words in str(e)
            for words in ("must alternate", "does not write its call", "no attribute 'content'")
        )
        assert refused and kind == "tools", e
        return
    twin = Conversation(given, by(f"{name}{TWIN}"))
    marked = [twin.marked(i) for i in range(1, n + 1)]
    for example in found if (name, kind) not in OTHER else ():
        for spans in (spans for text, spans in marked if text == example.text):
            # The prompt ends with what the server writes: a twin may mark some of it.
            assert learned(example.text, example.spans, example.prompt) == learned(
                example.text, spans, example.prompt
            )


@pytest.mark.skipif(not NAMES, reason="trl is not installed")
def test_reasoning_is_learned_or_its_loss_is_named():
    outcomes = {}
    for name in NAMES:
        given = row("one turn")
        given.columns["messages"][1]["reasoning_content"] = "Two pairs."
        try:
            (found,) = serving.examples(Conversation(given, by(name)), [1])
            outcomes[name] = "Two pairs." in found.text[found.prompt :]
        except DataError as e:
            assert str(e).startswith("row 1: turn 2: the chat template does not write its reasoning;"), e
    assert all(outcomes.values()) and len(outcomes) >= 19
