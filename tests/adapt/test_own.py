"""Names that belong to adapters, and those that only look so."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import models

import veneer
from veneer.sites import own

SOURCE = Path(veneer.__file__).parent


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.q_proj.deltas.default.A", ("model.q_proj", "default.A")),
        ("deltas.default.A", ("", "default.A")),
        ("q_proj.deltas", ("q_proj", "")),
        ("q_proj.weight", None),
        ("q_proj.deltas_of_time.weight", None),
        ("deltasum.weight", None),
    ],
)
def test_a_name_is_an_adapters_where_a_whole_part_of_it_says_so(name, parts):
    assert own.split(name) == parts
    assert own.is_own(name) == (parts is not None)


def test_an_adapted_model_has_the_modules_that_it_had_before():
    model = models.llama()
    before = list(own.base_modules(model))
    veneer.attach(model, "lora", rank=2)
    assert list(own.base_modules(model)) == before
    assert any(own.is_own(n) for n, _ in model.named_modules())


def test_the_word_for_an_adapters_child_is_written_in_one_file():
    told = [p for p in SOURCE.rglob("*.py") if '"deltas' in (text := p.read_text()) or '".deltas' in text]
    assert [p.name for p in told] == ["own.py"]
