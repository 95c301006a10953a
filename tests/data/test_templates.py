"""Chat templates and their masks: whole conversations in tests/golden, written by hand, with what is
learned between ⟦ and ⟧."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.objectives import causal_lm

from veneer.data import chat, row_files
from veneer.data.pack import IGNORED, collate, segments
from veneer.data.row_files import Row
from veneer.data.tokens import Tokens, encode
from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.runs.texts import texts
from veneer.tasks.text.next_token import loss
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

GOLDEN = Path(__file__).parents[1] / "golden"
# The tokens that these templates use: beginning, end of text, and others that are one token each.
SPECIAL = {
    "chatml": ("<|end|>", "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|begin|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "simple": (tiny.END, tiny.END, []),
    "none": (tiny.END, tiny.END, []),
}
MARKED = [
    name
    for name in SPECIAL
    if name != "none" and "generation %}" in (GOLDEN / f"{name}.jinja").read_text(encoding="utf-8")
]
CASES = sorted(p.name.removesuffix(".txt") for p in GOLDEN.glob("*.txt"))

TALK = {"messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"},
]}  # fmt: skip
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "add", "description": "adds"}}],
    "messages": [
        {"role": "user", "content": "2 and 3?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]},
        {"role": "tool", "content": "5"}, {"role": "assistant", "content": "Five."},
        {"role": "user", "content": "And 4 more?"}, {"role": "assistant", "content": "Nine."},
    ],
}  # fmt: skip


@functools.cache
def tokenizer(name: str) -> Any:
    made = copy.deepcopy(tiny.tokenizer())
    begin, end, more = SPECIAL[name]
    made.add_special_tokens({"bos_token": begin, "eos_token": end, "additional_special_tokens": more})
    made.chat_template = None if name == "none" else (GOLDEN / f"{name}.jinja").read_text(encoding="utf-8")
    return made


@pytest.fixture
def rows(tmp_path) -> dict[str, Row]:
    """Both conversations, as they come out of a file."""
    talk, tools = row_files.read_file(tiny.jsonl(tmp_path / "a.jsonl", TALK, TOOLS))
    return {"talk": talk, "tools": tools}


def shown(found: Tokens, by: Any) -> str:
    """The tokens as text, with ⟦ and ⟧ around what is learned.

    Masks change between tokens only, so this loses nothing.
    """
    out, before = [], False
    for token, learned in zip(found.ids.tolist(), found.learned.tolist(), strict=True):
        if learned != before:
            out.append("⟦" if learned else "⟧")
        out.append(by.decode([token]))
        before = learned
    return "".join(out) + ("⟧" if before else "")


def of(name: str, row: Row, *roles: str, train_on: str = "completion") -> str:
    by = tokenizer(name)
    found = chat.examples(row, by, train_on, roles or ("assistant",))
    return "\n=====\n".join(shown(encode(example, by), by) for example in found)


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_written_by_hand(case, rows):
    name, _, which = case.partition(".")
    assert of(name, rows[which]) == (GOLDEN / f"{case}.txt").read_text(encoding="utf-8").removesuffix("\n")


def test_there_are_five_templates_with_and_without_markers_and_four_with_tools():
    assert len(SPECIAL) - 1 == 5 and MARKED == ["chatml", "mistral"]
    assert sorted(c.partition(".")[0] for c in CASES if c.endswith("tools")) == [
        "chatml",
        "llama3",
        "mistral",
        "none",
        "simple",
    ]


@pytest.mark.parametrize(("name", "which"), [("chatml", "talk"), ("chatml", "tools"), ("mistral", "talk")])
def test_marked_masks_are_those_of_transformers(name, which, rows):
    by, row = tokenizer(name), rows[which]
    theirs = by.apply_chat_template(
        row.columns["messages"],
        tools=row.columns.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert shown(
        Tokens(torch.tensor(theirs["input_ids"]), torch.tensor(theirs["assistant_masks"]) == 1, None), by
    ) == of(name, row)


def test_roles_that_are_learned_can_be_chosen(rows):
    assert of("llama3", rows["talk"], "user").split("⟦")[1:] == [
        "2 + 2?<|eot_id|>⟧<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "And 3 + 3?<|eot_id|>⟧<|start_header_id|>assistant<|end_header_id|>\n\n6<|eot_id|>",
    ]
    both = of("chatml", rows["talk"], "assistant", "user")
    assert [part.partition("⟧")[0] for part in both.split("⟦")[1:]] == [
        "2 + 2?<|im_end|>\n", "4<|im_end|>", "And 3 + 3?<|im_end|>\n", "6<|im_end|>"
    ]  # fmt: skip
    assert [part.partition("⟧")[0] for part in of("none", rows["tools"], "tool").split("⟦")[1:]] == ["5"]
    assert of("llama3", rows["tools"], "tool").count("⟦5<|eot_id|>⟧") == 1
    assert of("chatml", rows["talk"], train_on="all").count("⟦") == 1


def test_a_conversation_that_the_template_refuses_is_named(rows):
    with pytest.raises(DataError) as e:
        of("gemma", rows["tools"])
    where = rows["tools"].where
    assert str(e.value) == f"{where}: the chat template refuses this conversation: no tools in this template"


def test_a_turn_that_the_template_changes_is_refused(rows):
    by = copy.deepcopy(tokenizer("simple"))
    by.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(
        DataError, match="turn 4: the chat template does not write its content unchanged; take 'user' out of"
    ):
        chat.parts(rows["talk"], by, "completion", ("user",))


def test_roles_that_make_no_sense_are_refused():
    with pytest.raises(
        ConfigError,
        match="train_roles chooses turns, but train_on='all' learns all of them; leave one of them out",
    ):
        Run(data="a.jsonl", train_on="all", train_roles=("user",))
    with pytest.raises(ConfigError, match="train_roles must name a role, got none"):
        Run(data="a.jsonl", train_roles=())


# -- the loss, by hand ----------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A model of three tokens whose next token depends on the present one alone, by a table of logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(
            torch.tensor(logits, dtype=torch.float64), freeze=False
        )

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.table(input_ids)})()


def test_the_loss_of_a_row_is_the_value_by_hand():
    # After token 0: p = (1/2, 1/4, 1/4). After 1: (1/8, 1/8, 3/4). After 2: (1/3, 1/3, 1/3).
    log = math.log
    model = Fixed([[log(2), 0.0, 0.0], [0.0, 0.0, log(6)], [5.0, 5.0, 5.0]])
    ids = torch.tensor([0, 1, 2, 0, 0])
    learned = torch.tensor([False, False, True, True, True])
    (found,) = segments(Tokens(ids, learned, torch.ones(5, dtype=torch.int64)), 8)
    assert found.labels.tolist() == [IGNORED, 2, 0, 0]
    value, n = loss(model, collate([(found,)], 0))
    # p(2 after 1) = 3/4, p(0 after 2) = 1/3, p(0 after 0) = 1/2: together 1/8.
    assert n == 3
    assert abs(value.item() - math.log(8)) < 1e-12


def test_the_loss_of_a_run_is_the_value_by_hand(tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny.base(tmp_path / "base"))
    with torch.no_grad():
        base.lm_head.weight.fill_(0.01)  # every token is as likely as every other one
    base.save_pretrained(tmp_path / "base")
    data = str(
        tiny.jsonl(
            tmp_path / "a.jsonl",
            {"prompt": "x", "completion": "yes"},
            {"prompt": "y", "completion": "no way"},
        )
    )
    common = {
        "model": str(tmp_path / "base"),
        "valid": data,
        "known": "none",
        "length": 32,
        "precision": "fp32",
        "device": "cpu",
    }
    fit(Run(data=f"{data}@2", method="full", steps=1, out=str(tmp_path / "run"), **common), progress=False)
    before, first, _ = tiny.metrics(tmp_path / "run")
    n = len(tiny.tokenizer())
    assert first["loss"] == pytest.approx(math.log(n), rel=1e-6)
    labels = len("yes") + 1 + len("no way") + 1  # each letter is a token here, and so is the end of each row
    assert [len(tiny.tokenizer()(text)["input_ids"]) for text in ("yes", "no way")] == [3, 6]
    assert first["labels"] % labels == 0
    assert before["valid_bpb"] == pytest.approx(labels * math.log2(n) / len("yesno way"), rel=1e-6)


# -- at the door ----------------------------------------------------------------------------------------


def gathered(data: str, **more: Any) -> dict[str, list[Row]]:
    run = Run(data=data, valid=data, known="none", **more)
    found = texts.gather(run, Notes())
    causal_lm(tiny.tokenizer(), **tiny.reading(run)).check_rows(found["train"])
    return found


def test_roles_that_no_turn_has_are_refused(tmp_path):
    data = str(tiny.jsonl(tmp_path / "a.jsonl", TALK))
    with pytest.raises(
        DataError, match="train_roles: no turn has the role 'asistant'; did you mean 'assistant'"
    ):
        gathered(data, train_roles=("asistant",))
    with pytest.raises(
        DataError, match="train_roles: no turn has the role 'tool'; known: assistant, system, user"
    ):
        gathered(data, train_roles=("assistant", "tool"))
    plain = str(tiny.jsonl(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}))
    with pytest.raises(
        DataError, match="train_roles: no turn has the role 'user'; the rows hold no conversation"
    ):
        gathered(plain, train_roles=("user",))
    assert gathered(plain)["train"] and gathered(data, train_roles=("user", "system"))["train"]


def test_weights_are_for_what_is_learned_from(tmp_path):
    data = str(tiny.jsonl(tmp_path / "a.jsonl", *({"prompt": "a", "completion": f"b{i}"} for i in range(20))))
    with pytest.raises(
        DataError, match=r"valid: .*@2: a measured text has no weight; remove @ and the number"
    ):
        texts.gather(Run(data=data, valid=f"{data}@2", known="none"), Notes())
    notes, run = Notes(), Run(data=f"{data}@3", known="none", packing=False, length=64)
    found = texts.gather(run, notes)
    assert {r.times for r in found["train"]} == {3} and {r.times for r in found["valid"]} == {1}
    assert f"by the weights of {data}@3, an epoch has 54 rows, of 18 different places" in notes.said
    assert (
        len(texts.prepare(found["train"], causal_lm(tiny.tokenizer(), **tiny.reading(run)), notes).examples)
        == 54
    )


def test_it_is_said_when_no_end_of_a_turn_is_learned(rows):
    by, notes = copy.deepcopy(tokenizer("mistral")), Notes()
    texts.prepare([rows["talk"]], causal_lm(by, length=256), notes)
    assert notes.said == []
    by.chat_template = by.chat_template.replace("+ eos_token", "").replace(
        "endgeneration %}", "endgeneration %}{{ eos_token }}"
    )
    texts.prepare([rows["talk"]], causal_lm(by, length=256), notes)
    assert notes.said == [
        "in 1 conversations no end of a turn is learned: the chat template's markers leave it out"
    ]
