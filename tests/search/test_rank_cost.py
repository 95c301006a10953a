"""The pilot form of `rank` costs at most 1.3 times its one training, counted in passes of tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import tiny
from torch import nn

from veneer.search.rank import pilot
from veneer.search.rank.rank import rank
from veneer.search.rank.settings import RankSearch
from veneer.train.run import Run
from veneer.verbs.search.rank import text


@pytest.fixture
def counted(monkeypatch):
    """Counts positions by what they are for: a step, an evaluation of the training, or the search."""
    found, inside, forward, fit = Counter(), [False], nn.Embedding.forward, pilot.fit

    def count(module, ids):
        found["step" if torch.is_grad_enabled() else "evaluation" if inside[0] else "search"] += ids.numel()
        return forward(module, ids)

    def training(*given, **options):
        inside[0] = True
        try:
            return fit(*given, **options)
        finally:
            inside[0] = False

    monkeypatch.setattr(nn.Embedding, "forward", count)
    monkeypatch.setattr(pilot, "fit", training)
    return found


def searched(folder, **changed):
    given = tiny.settings(folder, **{"accumulate": 1, "eval_windows": 0, "length": 8, **changed})
    given |= {"test": given["valid"], "options": {}, "compile": "off"}
    said = rank(Run.from_dict(given), RankSearch(most=16, out=str(folder / "rank")), progress=False)
    return said, text(said)


def test_the_pilot_costs_at_most_a_third_more_than_its_training(tmp_path, counted):
    (tmp_path / "base").mkdir()
    tiny.base(tmp_path / "base")
    for name, seed, words in (("train", 1, 1200), ("valid", 2, 2400), ("known", 3, 120)):
        (tmp_path / f"{name}.txt").write_text(tiny.text(seed, words), encoding="utf-8")
    found, shown = searched(tmp_path, batch=16, steps=40, eval_every=40, save_every=40, length=32)
    training = pilot.PASSES * counted["step"]
    assert 0 < counted["search"] <= 0.3 * training
    assert 1.15 < found["work_ratio"] <= 1.3, "valid text is cut to what the bound allows, not to nothing"
    assert found["work_ratio"] == pytest.approx(1 + counted["search"] / training, abs=0.05)
    assert "so that the search stays cheap" in " ".join(found["notes"])
    assert f"and {found['work_ratio']:.2f} times its work in tokens" in shown


def test_a_short_training_keeps_enough_examples_for_an_interval(tmp_path, counted):
    found, _ = searched(tmp_path, batch=2, steps=2, eval_every=2, save_every=2)
    assert found["work_ratio"] > 1.3 and all(
        e["low"] is not None for r, e in found["curve"].items() if r != "16"
    )
