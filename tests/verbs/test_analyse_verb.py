"""`veneer analyse` shows what an adapter changed, and saves changed ones exactly."""

from __future__ import annotations

import json

import pytest
import torch
from support import tiny
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.verbs.analyse import analyse, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base, and two adapters of it: one with a planted intruder in its first layer."""
    root = tmp_path_factory.mktemp("analyse")
    base = tiny.base(root / "base")
    for name, seed in (("first", 1), ("second", 2)):
        model = pretrained.causal_lm(str(base), torch.float32, torch.device("cpu"))
        veneer.attach(model, "lora", rank=4, name=name, seed=seed)
        torch.manual_seed(seed)
        for i, (_, delta) in enumerate(changes(model, name)):
            nn.init.normal_(delta.B, std=1.0 if i == 0 and name == "first" else 1e-3)
        veneer.save(model, root / name, name)
    (root / "text.txt").write_text(tiny.text(5, 200), encoding="utf-8")
    return root


def test_every_layer_has_ranks_a_share_and_intruders(folder):
    found = analyse([str(folder / "first")], k=4, progress=False)
    first, *rest = found.layers
    assert first["share"] > 0.99 and sum(layer["share"] for layer in found.layers) == pytest.approx(1)
    assert first["intruders"] == 4 and all(layer["intruders"] == 0 for layer in rest)
    assert all(1 <= layer["energy_rank"] <= 4 and layer["rank"] == 4 for layer in found.layers)
    assert found.roles["attention"] > 0.99 and sum(found.roles.values()) == pytest.approx(1)


def test_two_adapters_are_compared(folder, capsys):
    same = analyse([f"a={folder / 'first'}", f"b={folder / 'first'}"], progress=False)
    assert all(row["cosine"] == pytest.approx(1, abs=1e-5) for row in same.likeness["b"])
    assert main(["analyse", str(folder / "first"), str(folder / "second"), "--k", "4"]) == 0
    shown = capsys.readouterr().out
    assert "likeness to second: mean cosine" in shown and "intruder dimensions: 4" in shown


def test_intruders_are_scaled_away_and_scored(folder, tmp_path, capsys):
    out, line = str(tmp_path / "calm"), ["analyse", str(folder / "first"), "--scale", "0", "--k", "4"]
    assert main([*line, "--out", out, "--data", str(folder / "text.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changed"] == {"folder": out, "scale": 0, "intruders": 4}
    scores = found["scores"]["lines"][0]["adapters"]
    assert scores["before"]["value"] != scores["after"]["value"]
    model = pretrained.causal_lm(str(folder / "base"), torch.float32, torch.device("cpu"))
    veneer.load(model, out, name="calm")
    veneer.load(model, folder / "first", name="first")
    (site, calm), (_, loud) = changes(model, "calm")[0], changes(model, "first")[0]
    W = site.weight()
    U, S, Vh = torch.linalg.svd(W + loud.delta(site))
    wanted = W + loud.delta(site) - (U[:, :4] * S[:4]) @ Vh[:4]
    torch.testing.assert_close(W + calm.delta(site), wanted, rtol=1e-3, atol=1e-3 * float(S[0]))


def test_a_cut_is_saved_with_the_energy_it_loses(folder, tmp_path):
    out = tmp_path / "cut"
    found = analyse([str(folder / "first")], rank=2, out=str(out), progress=False)
    assert set(found.changed["ranks"].values()) == {2} and 0 < found.changed["lost_energy"] < 1
    assert "ranks 2 to 2" in text(found)
    assert {layer["rank"] for layer in analyse([str(out)], progress=False).layers} == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scale": 0.5}, "scale makes a new adapter; name its folder by out"),
        ({"scale": 0.5, "rank": 2, "out": "a"}, "scale and a cut are two steps"),
        ({"out": "a"}, "out needs a change to save; give scale or rank or energy"),
        ({"data": ["a.txt"]}, "data measures a changed adapter"),
    ],
)
def test_impossible_requests_are_refused(folder, given, message):
    with pytest.raises(ConfigError, match=message):
        analyse([str(folder / "first")], **given)
