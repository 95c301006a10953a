"""`veneer chat`: messages, commands and adapters at strengths, by the template of training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.models import randomise

import veneer
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.models import adapted, machine, pretrained
from veneer.verbs.chat import Chat
from veneer.verbs.generate import generate


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny.base(folder / "base")
    model = pretrained.causal_lm(str(folder / "base"), torch.float32, torch.device("cpu"))
    for seed, name in enumerate("ab"):
        veneer.attach(model, "lora", rank=2, name=name)
        randomise(model, name, seed=seed, size=0.5)
        veneer.save(model, folder / name, name)
        veneer.detach(model, name)
    return folder


def talked(place: Path, monkeypatch: Any, capsys: Any, *lines: str, words: str = "") -> tuple[list[Any], str]:
    """Returns the transcript, and what was printed on stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    own = (
        f"--model {place / 'base'} --adapter {place / 'a'} --adapter {place / 'b'} --tokens 8 --temperature 0"
    )
    assert main(f"chat {own} --dtype fp32 {words} --json".split()) == 0
    out, err = capsys.readouterr()
    return json.loads(out[out.index("[\n") :] if "[\n" in out else "[]"), err


def test_adapters_change_between_messages(place, monkeypatch, capsys):
    lines = (
        "/use a",
        "Hi",
        "/clear",
        "/use a@0.5 b",
        "Hi",
        "/base",
        "/clear",
        "Hi",
        "/again",
        "/quit",
        "never",
    )
    found, _ = talked(place, monkeypatch, capsys, *lines)
    assert [t["adapters"] for t in found] == [{"a": 1.0}, {"a": 0.5, "b": 1.0}, {}, {}]
    assert len({t["answer"] for t in found[:3]}) == 3 and found[2]["answer"] == found[3]["answer"]
    given = {"model": str(place / "base"), "tokens": 8, "temperature": 0.0, "chat": True, "dtype": "fp32"}
    own = generate("Hi", adapter=[str(place / "a")], **given)
    assert [found[2]["answer"], found[0]["answer"]] == [own["base"].strip(), own["a"].strip()]


def test_the_conversation_is_rendered_whole(place, monkeypatch):
    opened, wanted = adapted.open_all([str(place / "a")], model=str(place / "base"))
    asked: list[str] = []

    def written(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
        asked.append(prompt)
        return " fine"

    monkeypatch.setattr("veneer.verbs.chat.continuation", written)
    talk = Chat(opened, adapted.summed(wanted))
    talk.command("/system Be brief.")
    talk.answer("How are you?")
    talk.answer("And now?")
    assert all(part in asked[1] for part in ("Be brief.", "How are you?", "fine", "And now?"))
    assert "And now?" not in asked[0]
    talk.command("/clear")
    talk.answer("Anew")
    assert "Be brief." in asked[2] and "How are you?" not in asked[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/usee a", "unknown command /usee; did you mean 'use'?"),
        ("/use c", "unknown adapter 'c'; known: a"),
        ("/use", "write /use NAME or /use NAME@STRENGTH"),
        ("/strength much", "a strength must be a number, got 'much'"),
        ("/again", "no message to answer again"),
    ],
)
def test_wrong_commands_are_said_and_change_nothing(place, line, message):
    opened, wanted = adapted.open_all([str(place / "a")], model=str(place / "base"))
    talk = Chat(opened, adapted.summed(wanted))
    with pytest.raises(ConfigError) as e:
        talk.command(line)
    assert str(e.value) == message and talk.strengths == {"a": 1.0}
    assert talk.command("/strength 0.25") == "answers by a@0.25"
    assert talk.command("/adapters") == "loaded: a; in use: a@0.25"


def test_the_number_format_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert machine.dtype("bf16", cpu) == torch.bfloat16
    for able, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(machine, "multiplies_bf16", lambda where, able=able: able)
        assert machine.dtype("auto", cpu) == wanted
    with pytest.raises(ConfigError, match="unknown dtype 'float'"):
        machine.dtype("float", cpu)
