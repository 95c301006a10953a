"""The demo of a chat model: messages of a bank, answers before and after side by side."""

from __future__ import annotations

import json

import pytest
from support import models, tiny

from veneer.embedded import bank
from veneer.models.short_names import place
from veneer.verbs.demo import chat, choice


def test_messages_differ_and_their_answers_hold_what_they_say():
    for part, n in chat.ROWS.items():
        rows = bank.rows(part, n)
        said = [row["messages"][1]["content"] for row in rows]
        assert len({*said}) == len(rows) == n
        for row in rows:
            details = json.loads(row["messages"][2]["content"])
            assert details["intent"] in bank.SENTENCES
            assert all(str(v) in row["messages"][1]["content"] for k, v in details.items() if k != "intent")


def test_no_sentence_of_the_test_is_learned():
    learned = {row["messages"][1]["content"] for row in bank.rows("train", 400)}
    assert not learned & {row["messages"][1]["content"] for row in bank.rows("test", 48)}
    assert all(len(sentences) == 4 for sentences in bank.SENTENCES.values())


def test_no_message_is_in_two_parts():
    parts = chat.rows_of(0)
    assert {part: len(rows) for part, rows in parts.items()} == chat.ROWS
    said = [row["messages"][1]["content"] for rows in parts.values() for row in rows]
    assert len(said) == len({*said})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(chat, "ROWS", {"train": 12, "valid": 4, "test": 5})
    monkeypatch.setattr(chat, "LENGTH", 256)


def test_a_demo_writes_answers_before_and_after_and_goes_on(tmp_path, small):
    folder = tmp_path / "base"
    models.llama(vocab_size=len(tiny.tokenizer()), max_position_embeddings=512).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    found = choice.demo(str(tmp_path / "demo"), model=str(folder), steps=2, progress=False)
    stored = json.loads((tmp_path / "demo" / chat.ANSWERS).read_text())
    assert stored == json.loads(json.dumps(found)) and len(found["rows"]) == 5
    assert {*found["rows"][0]} == {"message", "truth", "before", "after"}
    said = {row["messages"][1]["content"] for row in bank.rows("test", 5)}
    assert {row["message"] for row in found["rows"]} == said
    shown = choice.text(found)
    assert "right answers: 0 of 5 before" in shown and found["rows"][0]["message"] in shown
    again = choice.demo(str(tmp_path / "demo"), model=str(folder), steps=2, progress=False)
    assert again["rows"] == found["rows"]


def test_the_name_of_a_real_model_is_its_folder_or_the_hubs_name(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_REAL", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert place("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert place("smollm2") == str(tmp_path / "smollm2")
    assert place("./other") == "./other"
