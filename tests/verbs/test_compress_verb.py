"""`veneer compress`: folders that open like any base, whichever way the model was read."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from support import tiny

import veneer
from veneer.cli.frame import main
from veneer.compress import folder as folders
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.work import Work
from veneer.models import pretrained
from veneer.models.streamed import Streamed
from veneer.verbs.compress import compress as verb

FLAGS = ["--samples", "6", "--length", "24", "--batch", "2", "--multiple", "1"]
INPUTS = {"input_ids": torch.arange(16)[None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and texts."""
    made = tmp_path_factory.mktemp("compress")
    tiny.settings(made)
    return made


def run(folder: Path, out: str, *flags: str) -> int:
    data = str(folder / "train.txt")
    return main(
        ["compress", str(folder / "base"), "--out", str(folder / out), "--data", data, *FLAGS, *flags]
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*")) if p.is_file()}


def test_a_compressed_folder_generates_trains_and_is_measured(folder, capsys):
    assert run(folder, "small", "--keep", "0.7", "--refine", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 0.6 < told["kept"] <= 0.7 and told["parameters"][1] < told["parameters"][0]
    record = json.loads((folder / "small" / "factored.json").read_text())
    assert record["method"] == "auto" and record["kept"] == told["kept"]
    assert record["model"] == str(folder / "base") and not (folder / "small.work").exists()
    small = str(folder / "small")
    model = veneer.load_compressed(small)
    held = sum(t.nbytes for t in folders.weights(model).values())
    assert 0 < told["bytes"][1] - held < 20_000  # the files' headers
    assert sum(p.numel() for p in model.parameters()) == told["parameters"][1]
    assert main(["generate", "the cat", "--model", small, "--tokens", "3"]) == 0
    text = str(folder / "valid.txt")
    assert main(["eval", small, "--data", text, "--length", "32"]) == 0
    settings = tiny.settings(folder, model=small, out=str(folder / "run"), steps=4, report=False)
    veneer.fit(veneer.Run(**settings), progress=False)
    assert main(["generate", "the cat", "--adapter", str(folder / "run"), "--tokens", "3"]) == 0
    assert (
        main(["merge", str(folder / "run"), "--out", str(folder / "merged"), "--dtype", "fp32", "--force"])
        == 0
    )
    merged = pretrained.causal_lm(str(folder / "merged"), torch.float32, torch.device("cpu"))
    assert veneer.sites.changed.forms_of(merged)["factored"]
    capsys.readouterr()


def test_expanded_it_is_an_ordinary_model(folder, capsys):
    from transformers import AutoModelForCausalLM

    flags = ["--keep", "0.7", "--method", "allocate", "--dtype", "fp32"]
    assert run(folder, "thin", *flags) == 0 and run(folder, "dense", *flags, "--expand") == 0
    thin, dense = (
        veneer.load_compressed(folder / "thin"),
        AutoModelForCausalLM.from_pretrained(folder / "dense"),
    )
    torch.testing.assert_close(dense(**INPUTS).logits, thin(**INPUTS).logits, rtol=1e-4, atol=1e-4)
    assert run(folder, "other", "--method", "lord", "--expand") == 2
    assert "adds biases, for which this model's layers have no place" in capsys.readouterr().err


def test_int8_and_nf4_factors_train_as_one_chain(folder, capsys):
    """QLoRA over LoRD: compress, then fit on quantised factors, then open both together."""
    assert run(folder, "lord", "--keep", "0.8", "--method", "lord") == 0
    settings = tiny.settings(folder, model=str(folder / "lord"), out=str(folder / "qlora"), quantise="nf4")
    veneer.fit(veneer.Run(**{**settings, "steps": 4, "report": False}), progress=False)
    manifest = json.loads((folder / "qlora" / "adapter" / "veneer.json").read_text())
    assert manifest["base"]["quantised"] == ["nf4"] and manifest["base"]["factored"] == ["plain"]
    assert main(["generate", "the cat", "--adapter", str(folder / "qlora"), "--tokens", "3"]) == 0
    capsys.readouterr()


def test_blocks_read_one_by_one_are_compressed_as_blocks_in_memory(folder, tmp_path, monkeypatch):
    base = folder / "base"
    model = pretrained.causal_lm(str(base), torch.float32, torch.device("cpu"))
    streamed = Streamed(base, "all-linear", ())
    assert all(p.is_meta for b in streamed.walk.blocks for p in b.parameters())
    for i in range(len(streamed)):
        with streamed.block(i) as a, Held(model, "all-linear", ()).block(i) as b:
            assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert run(folder, "a", "--refine", "1", "--dtype", "fp32") == 0
    monkeypatch.setattr(verb, "Streamed", _refuses)
    assert run(folder, "b", "--refine", "1", "--dtype", "fp32") == 0
    a, b = weights(folder / "a"), weights(folder / "b")
    assert a.keys() == b.keys() and all(a[n] == b[n] for n in a if n.endswith(".safetensors"))


def _refuses(*given: object) -> None:
    raise veneer.errors.FormatError("other names")


@pytest.mark.parametrize("at", [1, 2])
def test_the_same_command_goes_on_and_ends_in_the_same_bytes(folder, at, monkeypatch, capsys):
    shutil.rmtree(folder / "whole", ignore_errors=True)
    assert run(folder, "whole", "--refine", "1") == 0
    put, calls = Work.put, []

    def stopping(self, name, *rest):
        calls.append(name)
        if name.startswith("block") and len([c for c in calls if c.startswith("block")]) > at - 1:
            raise KeyboardInterrupt
        put(self, name, *rest)

    monkeypatch.setattr(Work, "put", stopping)
    out = f"half{at}"
    assert run(folder, out, "--refine", "1") != 0
    assert not (folder / out).exists() and (folder / f"{out}.work").is_dir()
    monkeypatch.setattr(Work, "put", put)
    assert run(folder, out, "--refine", "1") == 0
    assert weights(folder / out) == weights(folder / "whole")
    capsys.readouterr()


def test_bad_input_is_refused_before_any_work(folder, capsys):
    def refused(told: str, *words: str, code: int = 2) -> None:
        assert main(["compress", *words]) == code
        assert told in capsys.readouterr().err

    base, out = str(folder / "base"), str(folder / "new")
    refused("keep must be above 0 and at most 1, got 1.2", base, "--out", out, "--keep", "1.2")
    refused("data must name calibration texts, got none", base, "--out", out)
    refused("exists; choose another folder", base, "--out", str(folder))
    refused("batch must be 1 or more", base, "--out", out, "--batch", "0")
    refused("unknown dtype", base, "--out", out, "--dtype", "int3", "--data", str(folder / "train.txt"))
    if (folder / "small").is_dir():
        refused("is factored already", str(folder / "small"), "--out", out)
    assert not list(folder.glob("new*"))


def test_a_full_disk_is_said_and_the_work_is_kept(folder, monkeypatch, capsys):
    def full(self, name, *rest):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Work, "put", full)
    assert run(folder, "full", "--method", "allocate") == 1
    assert "and repeat the command, which goes on from" in capsys.readouterr().err
    assert not (folder / "full").exists()


def test_the_curve_measures_every_model_on_the_same_windows_and_says_what_is_better(folder, capsys):
    flags = ["--curve", "--keeps", "0.9,0.5", "--refine", "1", "--valid", str(folder / "valid.txt")]
    assert run(folder, "curve", *flags) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "curve" / "curve.json").read_text())
    names = [(p["name"], p["keep"]) for p in found["points"]]
    each = [(n, k) for k in (0.9, 0.5) for n in ("low rank", "magnitude", "wanda")]
    assert names == [("dense", None), ("int8", None), ("nf4", None), ("spqr", None), *each]
    at = {(p["name"], p["keep"]): p for p in found["points"]}
    assert at["nf4", None]["bytes_"] < at["int8", None]["bytes_"] < at["dense", None]["bytes_"]
    assert at["low rank", 0.5]["parameters"] < at["low rank", 0.9]["parameters"]
    for keep in (0.9, 0.5):
        ours, theirs = at["low rank", keep]["bytes_"], at["wanda", keep]["bytes_"]
        assert abs(ours - theirs) < 0.1 * ours
    assert all(p["prefill_seconds"] > 0 < p["decode_seconds"] for p in found["points"])
    assert (folder / "curve" / "curve.png").stat().st_size > 10_000
    assert "int8 takes" in printed and "| low rank | 0.5 |" in (folder / "curve" / "curve.md").read_text()
    assert not (folder / "curve.work").exists()
    assert run(folder, "other", "--curve", "--keeps", "0.9,x") == 2
    assert "keeps must be numbers above 0 and at most 1" in capsys.readouterr().err


def test_the_advice_names_the_ratios_at_which_quantisation_is_better():
    from veneer.verbs.compress.curve_page import advice

    def point(name: str, keep: float | None, size: int, bits: float) -> dict:
        return {"name": name, "keep": keep, "bytes_": size, "bits_per_byte": bits, "prefill_seconds": 1.0}

    points = [point("dense", None, 1000, 1.0), point("int8", None, 500, 1.01), point("nf4", None, 300, 1.2)]
    points += [point("low rank", 0.9, 900, 1.005), point("low rank", 0.6, 600, 1.1)]
    said = advice(points).splitlines()
    assert said[0].endswith("better than low rank at keep 0.6, which takes more bytes and loses more.")
    assert said[1].endswith("no measured low-rank model takes as many bytes and loses more.")
