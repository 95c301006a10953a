"""generate, inspect and merge from the command line on a real model: the built-in one, adapted for two
steps."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import veneer
from veneer.adapt.attached import changes
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.models.adapted import parse
from veneer.tasks.text.samples import continuation

IDS = torch.arange(2, 34).view(2, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, and beside it `tiny`, an adapter whose change is below bfloat16's steps."""
    root = tmp_path_factory.mktemp("verbs")
    words = [
        "fit",
        "--data",
        "builtin:prose",
        "--known",
        "none",
        "--steps",
        "2",
        "--batch",
        "2",
        "--length",
        "64",
        "--no-report",
    ]
    assert (
        main(
            [*words, "--eval-windows", "2", "--precision", "fp32", "--lr", "0.02", "--out", str(root / "fit")]
        )
        == 0
    )
    model = veneer.attach(pretrained.causal_lm("builtin", torch.float32, torch.device("cpu")), "lora", rank=2)
    with torch.no_grad():
        for _, delta in changes(model, "default"):
            delta.B.add_(1e-6)
    veneer.save(model, root / "tiny")
    return root


def adapted(folder, strength=1.0):
    model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
    veneer.load(model, folder)
    veneer.activate(model, {"default": strength})
    return model(IDS).logits


def test_one_adapter_at_several_strengths_side_by_side(run, capsys):
    folder = run / "fit"
    words = [
        "generate",
        "def area(",
        "--adapter",
        str(folder),
        "--adapter",
        f"{folder}@0.5",
        "--adapter",
        f"{folder}@0",
        "--tokens",
        "8",
    ]
    assert main([*words, "--temperature", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["base", "fit", "fit at 0.5", "fit at 0"] and told["fit at 0"] == told["base"]


def test_a_fully_fine_tuned_model_beside_a_low_rank_adapter(run, capsys):
    words = [
        "fit",
        "--data",
        "builtin:prose",
        "--known",
        "none",
        "--steps",
        "2",
        "--batch",
        "2",
        "--length",
        "64",
        "--no-report",
    ]
    assert (
        main(
            [*words, "--eval-windows", "2", "--method", "full", "--lr", "0.003", "--out", str(run / "whole")]
        )
        == 0
    )
    words = [
        "generate",
        "def area(",
        "--adapter",
        str(run / "whole"),
        "--adapter",
        str(run / "fit"),
        "--adapter",
        f"{run / 'whole'}@0",
    ]
    capsys.readouterr()
    assert main([*words, "--tokens", "8", "--temperature", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        list(told) == ["base", "whole", "fit", "whole at 0"]
        and told["whole at 0"] == told["base"] != told["whole"]
    )
    model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
    veneer.load(model, run / "fit" / "adapter")
    tokenizer = pretrained.tokenizer("builtin")
    assert told["fit"] == continuation(model, tokenizer, "def area(", temperature=0, max_new_tokens=8)


def test_inspect_tells_layers_and_what_a_merge_would_cost(run, capsys):
    assert main(["inspect", str(run / "fit"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["base"] == "builtin"
        and told["method"] == "lora"
        and told["parameters"] == 157_696
        and len(told["layers"]) == 28
    )
    assert (
        all(0 < layer["norm"] and layer["rank"] == 8 for layer in told["layers"])
        and told["survives"]["bfloat16"]
    )
    assert main(["inspect", str(run / "tiny"), "--model", "builtin"]) == 0
    assert "merged into bfloat16: would be LOST" in capsys.readouterr().out


def test_a_merged_model_does_what_the_adapter_did(run, capsys):
    out = run / "merged"
    assert main(["merge", f"{run / 'fit'}@0.5", "--out", str(out), "--dtype", "float32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["lost"] and told["logit_error"] < 1e-3
    merged = pretrained.causal_lm(str(out), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(
        merged(IDS).logits, adapted(run / "fit" / "adapter", 0.5), rtol=1e-4, atol=1e-4
    )
    assert json.loads((out / "merge.json").read_text())["merged"] == [f"{run / 'fit'}@0.5"]
    assert len({f.stat().st_mode for f in out.iterdir()}) == 1  # the weights can be read by whom the rest can
    assert main(["merge", str(run / "fit"), "--out", str(out)]) == 2
    assert "exists; choose another or" in capsys.readouterr().err


def test_a_merge_that_loses_the_adapter_saves_nothing_and_says_no(run, capsys):
    out = run / "lost"
    words = ["merge", str(run / "tiny"), "--model", "builtin", "--out", str(out)]
    assert main(words) == 3
    assert "the adapter would be lost in the merge: LOST" in capsys.readouterr().err
    assert not out.exists() and not list(run.glob(".lost*"))
    assert main([*words, "--force"]) == 0 and out.is_dir()


def test_missing_and_ambiguous_adapters_are_usage_errors(run, capsys):
    assert main(["inspect", str(run / "gone")]) == 2
    assert "the folder does not exist" in capsys.readouterr().err
    (run / "empty").mkdir()
    shutil.copytree(run / "fit", run / "begun", ignore=shutil.ignore_patterns("adapter", "results.json"))
    assert (
        main(["generate", "x", *(w for n in ("gone", "empty", "begun") for w in ("--adapter", str(run / n)))])
        == 2
    )
    assert capsys.readouterr().err == (
        f"error: adapter {run / 'gone'}: the folder does not exist\n"
        f"adapter {run / 'empty'}: it holds no adapter (adapter_config.json, veneer.json)\n"
        f"adapter {run / 'begun'}: the run there has not finished, and has no adapter yet; go on with it by"
        " veneer fit --resume\n"
    )
    for verb in ("inspect", "verify"):
        assert main([verb, str(run)]) == 2
        assert (
            f"adapter {run}: it holds no adapter; name one of {run / 'fit'}, {run / 'tiny'}"
            in capsys.readouterr().err
        )
    with pytest.raises(ConfigError, match=r"several adapters are called fit; name them apart: first=a/fit"):
        parse(["a/fit", "b/fit"])
    with pytest.raises(ConfigError, match=r"write FOLDER, NAME=FOLDER or FOLDER@STRENGTH"):
        parse(["a@b@c"])
    (at := run / "odd@2").mkdir()
    assert parse([str(at)])[0].folder == at and parse([str(at)])[0].strength == 1
    (x,) = parse(["x=a/b@-0.5"])
    assert (x.name, x.strength) == ("x", -0.5)
