"""combine and extract from the command line, on folders."""

from __future__ import annotations

import json

import pytest
import torch
from support.adapters import IDS, llama, shake
from support.tiny import tokenizer

import veneer
from veneer.cli.frame import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with two adapters, and a copy of it with one of them merged."""
    root = tmp_path_factory.mktemp("algebra")
    model = llama()
    tokenizer().save_pretrained(root / "base")
    model.save_pretrained(root / "base")
    for name, options in (("a", {"rank": 3}), ("b", {"rank": 2, "init": "pissa"})):
        veneer.attach(model, "lora", name=name, **options)
        shake(model, name)
        veneer.save(model, root / name, name)
    veneer.detach(model, "b")
    veneer.merge(model)
    tokenizer().save_pretrained(root / "tuned")
    model.save_pretrained(root / "tuned")
    return root


def outputs(folder, *adapters):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for i, (path, _) in enumerate(adapters):
        veneer.load(model, path, f"n{i}")
    veneer.activate(model, {f"n{i}": strength for i, (_, strength) in enumerate(adapters)})
    return model(IDS).logits


def test_a_combination_saved_does_what_its_parts_do(folders, capsys):
    out = folders / "mixed"
    words = [
        "combine",
        f"{folders}/a@0.5",
        f"{folders}/b@-0.25",
        "--out",
        str(out),
        "--model",
        f"{folders}/base",
        "--json",
    ]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 14 and max(c["error"] for c in told["layers"]) < 1e-5
    wanted = outputs(folders / "base", (folders / "a", 0.5), (folders / "b", -0.25))
    torch.testing.assert_close(outputs(folders / "base", (out, 1.0)), wanted, rtol=1e-4, atol=1e-4)
    assert main(words) == 2
    assert "exists; choose another or" in capsys.readouterr().err


def test_what_training_changed_comes_back_as_an_adapter(folders, capsys):
    out = folders / "found"
    assert (
        main(
            [
                "extract",
                f"{folders}/tuned",
                "--base",
                f"{folders}/base",
                "--out",
                str(out),
                "--energy",
                "0.999999",
            ]
        )
        == 0
    )
    assert f"saved in {out}" in capsys.readouterr().out
    torch.testing.assert_close(
        outputs(folders / "base", (out, 1.0)), outputs(folders / "tuned"), rtol=1e-2, atol=1e-2
    )
    words = ["extract", f"{folders}/tuned", "--base", f"{folders}/base", "--out", str(folders / "other")]
    assert main(words) == 2
    assert (
        "how far to cut? give rank= or energy=" in capsys.readouterr().err
        and not (folders / "other").exists()
    )
