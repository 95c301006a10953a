"""Every turn is learned in the text that a server would have before it, whatever happens to earlier turns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import tiny
from tokenizers.processors import TemplateProcessing

from veneer.data import chat
from veneer.data.chat import templates
from veneer.data.chat.rendering import common, specials
from veneer.data.row_files import Row
from veneer.data.tokens import encode
from veneer.errors import DataError
from veneer.tasks.text.samples import continuation

# Reasoning leaves earlier turns once the user has spoken again, as in Qwen3.
FORGETS = """{%- set ns = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == "user" %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {{- "<s>" + m.role + "\n" }}
    {%- if m.role == "assistant" and loop.index0 > ns.user %}
        {{- "<think>" + (m.reasoning_content or "") + "</think>" }}
    {%- endif %}
    {{- m.content + "<e>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant\n" }}{% endif %}"""
# The last answer ends by another token than earlier ones, as in gpt-oss.
RETURNS = """{%- for m in messages %}
    {{- "<s>" + m.role + ":" + m.content + ("<r>" if loop.last and m.role == "assistant" else "<e>") }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant" }}{% endif %}"""
# An end-of-text token follows the whole conversation, as in Phi-3.
CLOSES = """{%- for m in messages %}{{- "<s>" + m.role + "\n" + m.content + "<e>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant\n" }}{% else %}{{- eos_token }}{% endif %}"""
# The request for an answer opens <think>, which the finished turn lacks, as in DeepSeek-R1's distillates.
ASKS = """{%- for m in messages %}
    {{- "<s>" + m.role + ":" }}
    {{- m.content.split("</think>")[-1] if m.role == "assistant" else m.content }}{{- "<e>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant:<think>\n" }}{% endif %}"""
# Arguments of calls are joined to text, and a turn with calls has null for content, as in DeepSeek-V3.
JOINS = """{%- for m in messages %}
    {%- if m.role == "assistant" and m.content is none %}
        {%- for c in m.tool_calls %}
            {{- "<s>call " + c.function.name + c.function.arguments + "<e>" }}
        {%- endfor %}
    {%- else %}{{- "<s>" + m.role + ":" + m.content + "<e>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<s>" }}{% endif %}"""
# Content is a list of parts, as in templates for pictures.
PARTS = """{%- for m in messages %}{{- "<s>" + m.role + ":" }}
    {%- for p in m.content %}{% if p.type == "text" %}{{- p.text }}{% endif %}{% endfor %}{{- "<e>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant:" }}{% endif %}"""
# Written without calls, so that they are lost.
MUTE = """{%- for m in messages %}{{- "<s>" + m.role + ":" + (m.content or "") + "<e>" }}{% endfor %}
{%- if add_generation_prompt %}{{- "<s>assistant:" }}{% endif %}"""
NEEDS_USER = """{%- if not messages | selectattr("role", "equalto", "user") | list %}
    {{- raise_exception("no user") }}
{%- endif %}"""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TWO = [user("A?"), said("a."), user("B?"), said("b.")]
BOTH = "<s>user:A?<e><s>assistant:⟦a.<e>⟧<s>user:B?<e><s>assistant:⟦b.<e>END⟧"  # TWO in a single example
LACKS = "turn 2: the chat template does not write its"
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
CALLS = [
    user("Sky?"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "clear"},
    said("Blue."),
]


def by(template: str | None) -> Any:
    made = copy.deepcopy(tiny.tokenizer())
    made.add_special_tokens({"additional_special_tokens": ["<s>", "<e>", "<r>"]})
    made.chat_template = template
    return made


def shown(template: str | None, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    """The examples as text, with what is learned between ⟦ and ⟧."""
    found = chat.examples(Row("messages", {"messages": messages}, "row 1"), by(template), **more)
    return [
        "".join((f"⟦{p.text or 'END'}⟧" if p.learned else p.text or "END") for p in one).replace("⟧⟦", "")
        for one in found
    ]


@pytest.mark.parametrize(
    ("template", "messages", "examples"),
    [
        pytest.param(
            FORGETS,
            [user("A?"), said("a.", reasoning_content="x"), user("B?"), said("b.", reasoning_content="y")],
            [
                "<s>user\nA?<e>\n<s>assistant\n⟦<think>x</think>a.<e>\n⟧",
                "<s>user\nA?<e>\n<s>assistant\na.<e>\n"
                "<s>user\nB?<e>\n<s>assistant\n⟦<think>y</think>b.<e>\nEND⟧",
            ],
            id="reasoning-removed",
        ),
        pytest.param(
            RETURNS,
            TWO,
            [
                "<s>user:A?<e><s>assistant⟦:a.<r>⟧",
                "<s>user:A?<e><s>assistant:a.<e><s>user:B?<e><s>assistant⟦:b.<r>END⟧",
            ],
            id="another-end-token",
        ),
        pytest.param(
            CLOSES,
            TWO,
            ["<s>user\nA?<e>\n<s>assistant\n⟦a.<e>\n⟧<s>user\nB?<e>\n<s>assistant\n⟦b.<e>\n<|end|>⟧"],
            id="end-of-text-after-all",
        ),
        pytest.param(
            ASKS, TWO, [BOTH], id="think-not-kept"
        ),
        pytest.param(
            ASKS,
            [user("A?"), said("<think>\nx\n</think>\n\na.")],
            ["<s>user:A?<e><s>assistant:<think>\n⟦x\n</think>\n\na.<e>END⟧"],
            id="think-asked-for",
        ),
        pytest.param(
            JOINS,
            CALLS,
            ['<s>user:Sky?<e><s>⟦call sky{"city": "Oslo"}<e>⟧<s>tool:clear<e><s>⟦assistant:Blue.<e>END⟧'],
            id="arguments-as-text-and-null-content",
        ),
        pytest.param(
            PARTS, TWO, [BOTH], id="content-as-parts"
        ),
        pytest.param(
            MUTE,
            [said("Hi."), *TWO[:2]],
            ["<s>assistant:⟦Hi.<e>⟧<s>user:A?<e><s>assistant:⟦a.<e>END⟧"],
            id="opening",
        ),
        pytest.param(
            NEEDS_USER + MUTE,
            [said("Hi."), *TWO[:2]],
            ["<s>assistant:Hi.<e><s>user:A?<e><s>assistant:⟦a.<e>END⟧"],
            id="an-opening-no-server-asks-for",
        ),
        pytest.param(
            MUTE,
            [user("A?"), said("a.", weight=0), user("B?"), said("b.", weight=1)],
            ["<s>user:A?<e><s>assistant:a.<e><s>user:B?<e><s>assistant:⟦b.<e>END⟧"],
            id="weights",
        ),
        pytest.param(
            None,
            [user("A?"), said("a.", train=False), user("B?"), said("b.", trainable=True, loss_weight=1.0)],
            ["### user\nA?\n\n### assistant\na.END\n\n### user\nB?\n\n### assistant\n⟦b.END⟧"],
            id="weights-in-the-plain-template",
        ),
    ],
)  # fmt: skip
def test_turns_are_learned_as_a_server_would_ask_for_them(template, messages, examples):
    assert shown(template, messages) == examples


def test_the_last_turn_alone_can_be_learned():
    assert shown(RETURNS, TWO, which="last") == shown(RETURNS, TWO)[1:]
    (one,) = shown(MUTE, TWO, which="last")
    assert one.count("⟦") == 1 and one.endswith("⟦b.<e>END⟧")
    assert shown(MUTE, [*TWO[:3], said("b.", weight=0)], which="last")[0].count("⟦") == 0


def test_all_of_a_rewritten_conversation_can_be_learned():
    assert shown(RETURNS, TWO, train_on="all") == [
        "⟦<s>user:A?<e><s>assistant:a.<e><s>user:B?<e><s>assistant:b.<r>END⟧"
    ]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (MUTE, CALLS, f"{LACKS} call of 'sky'; remove it, or choose another template by chat_template"),
        (MUTE, [user("A?"), said("a.", reasoning_content="x")], f"{LACKS} reasoning;"),
        (MUTE.replace("m.content or", "m.content | upper or"), TWO, f"{LACKS} content;"),
        (NEEDS_USER + MUTE, [said("Hi.")], "the chat template refuses this conversation: no user"),
    ],
)  # fmt: skip
def test_a_turn_that_the_rendering_lacks_is_named(template, messages, message):
    with pytest.raises(DataError) as e:
        shown(template, messages)
    assert str(e.value).startswith(f"row 1: {message}")


def test_the_plain_template_is_the_same_in_python_and_in_jinja():
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
    row = Row(
        "messages",
        {"messages": [{"role": "system", "content": "Be brief."}, *CALLS, *TWO], "tools": tools},
        "",
    )
    bare, rendered = by(None), templates.complete(by(None))
    ours, theirs = (encode(chat.parts(row, t), t) for t in (bare, rendered))
    assert ours.ids.tolist() == theirs.ids.tolist() and ours.learned.tolist() == theirs.learned.tolist()
    assert (
        templates.asked("A?", bare)
        == templates.asked("A?", rendered)
        == "<|end|>### user\nA?\n\n### assistant\n"
    )


def test_special_tokens_are_shared_as_a_whole():
    names = specials(by(None))
    assert common("ab<s>x", "ab<e>x", names) == 2 and common("ab<s>x", "ab<s>y", names) == 5
    assert common("ab<", "ab<s>", names) == 2 and common("same", "same", names) == 4


class Asked(torch.nn.Module):
    """A model that remembers what it is asked and answers nothing."""

    config = type("Config", (), {"max_position_embeddings": 512})()

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ids: list[int] = []

    def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.ids = ids[0].tolist()
        return ids


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + MUTE, FORGETS])
def test_generation_asks_as_training_did(template):
    """One beginning token, where the template writes one and the tokenizer would add another."""
    tokenizer, model = by(template), Asked()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("A?")["input_ids"][0] == tokenizer.bos_token_id
    (found,) = (
        encode(one, tokenizer) for one in chat.examples(Row("messages", {"messages": TWO[:2]}, ""), tokenizer)
    )
    continuation(model, tokenizer, templates.asked("A?", tokenizer), chat=True, max_new_tokens=1)
    n = int(found.learned.int().argmax())
    assert model.ids == found.ids[:n].tolist()
    assert model.ids.count(tokenizer.bos_token_id) == (0 if template == FORGETS else 1)
