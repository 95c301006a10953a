"""A pretraining small enough for a test."""

from __future__ import annotations

import json

import pytest

from veneer.embedded import build, texts
from veneer.embedded.texts import Document

SMALL = ["--batch", "2", "--length", "16", "--vocabulary", "300", "--threads", "1", "--every", "4"]


@pytest.fixture
def small(monkeypatch):
    source = "def add(first, second):\n    return first + second\n\n"
    documents = [Document(f"m{i}.py", source * 8) for i in range(4)]
    documents += [Document(f"test/t{i}.py", "assert add(1, 2) == 3\n" * 20) for i in range(3)]
    monkeypatch.setattr(texts, "library", lambda tests=True: documents)
    monkeypatch.setattr(texts, "known", lambda split: [Document("held.py", source * 5)])
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    monkeypatch.setattr(build, "SIZES", {**build.SIZES, **sizes})


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
