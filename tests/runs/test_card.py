"""The model card of a run: its numbers are the run's, its header is the Hub's, and what it says to type
works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny

from veneer.runs import card, usage
from veneer.runs.fit import fit
from veneer.train.folder.result import Result
from veneer.train.run import Run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("card")


def made(place: Path, name: str, **changed: Any) -> tuple[Result, str]:
    """A short run, once a method, and its card."""
    out = place / name
    if not (out / "results.json").exists():
        fit(
            Run.from_dict(tiny.settings(place, out=str(out), steps=4, eval_every=2, **changed)),
            progress=False,
        )
    result = Result.read(out)
    return result, (result.adapter / card.CARD).read_text(encoding="utf-8")


def beside(result: Result, place: Path, monkeypatch: Any) -> None:
    """Goes into the adapter's folder, where the base is found by the name that the card has for it."""
    monkeypatch.chdir(result.adapter)
    if not Path("base").exists():
        Path("base").symlink_to(place / "base")


def header(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---")[1])
    assert isinstance(found, dict)
    return found


def table(text: str, section: str) -> dict[str, list[str]]:
    """The rows of the section's table by their first cell."""
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in part.splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows[2:]}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_numbers_are_the_runs(place):
    result, text = made(place, "lora")
    figures = table(text, "Learned and forgotten")
    before, after = result.metrics["before"], result.metrics["after"]
    assert figures["new text (valid)"][:2] == [f"{before['valid']:.3f}", f"{after['valid']:.3f}"]
    assert figures["known text"][:2] == [f"{before['known']:.3f}", f"{after['known']:.3f}"]
    config = json.loads((result.folder / "config.json").read_text(encoding="utf-8"))
    for part, cells in table(text, "Data").items():
        facts = config["data"][part]
        assert cells[1:] == [f"{facts[k]:,}" for k in ("rows", "windows", "tokens", "learned_tokens")]
    assert table(text, "Data")["train"][0] == "train.txt"  # no path of this machine
    assert config["base"]["sha256"] in text and "14 layers are changed, of rank 4, scaled by 2" in text
    assert table(text, "Training")["`lr`"] == ["0.01"]
    assert table(text, "Method")["`dropout`"][:2] == [
        "0.1",
        "share of the adapter's inputs dropped in training; the base path keeps all",
    ]
    assert (
        "(https://arxiv.org/abs/2106.09685)" in text
        and "4 steps and" in text
        and "No test text was given" in text
    )


def test_the_header_names_what_the_hub_can_know(place):
    for name, library, tags in (("lora", "peft", ["lora", "veneer"]), ("full", "veneer", ["full", "veneer"])):
        extra = {"method": "full", "options": {}, "lr": 1e-3} if name == "full" else {}
        found = header(made(place, name, **extra)[1])
        assert found == {
            "library_name": library,
            "pipeline_tag": "text-generation",
            "tags": tags,
        }  # the base is a folder here
    assert card._header(
        {"model": "org/llama"}, "text-generation", {"method": "dora"}, {"peft_type": "LORA"}
    ).splitlines() == [
        *("---", 'base_model: "org/llama"', "library_name: peft", "pipeline_tag: text-generation", "tags:"),
        *("- dora", "- lora", "- veneer", "---"),
    ]


def test_what_it_says_to_type_loads_the_same_model_in_veneer_and_peft(place, monkeypatch):
    result, text = made(place, "lora")
    assert len(blocks(text)) == 2
    assert str(place) not in text and "`base` stands for the path of the base model's folder." in text
    beside(result, place, monkeypatch)
    ids = torch.arange(12)[None]
    outputs = []
    for block in blocks(text):
        space: dict[str, Any] = {}
        exec(block, space)
        outputs.append(space["model"].eval()(ids).logits)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "base")(ids).logits
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5) and not torch.allclose(
        outputs[0], base, atol=1e-2
    )
    assert "--enable-lora --max-lora-rank 8 --lora-modules adapter=." in text


@pytest.mark.parametrize(("method", "blocks_shown"), [("dora", 2), ("vera", 2), ("loldu", 1)])
def test_what_vllm_does_not_read_becomes_plain_lora_as_it_is_said(
    place, method, blocks_shown, monkeypatch, capsys
):
    from veneer.cli.frame import main

    result, text = made(place, method, method=method, options={"rank": 4})
    assert "vllm serve" not in text and len(blocks(text)) == blocks_shown
    command = re.search(r"`veneer (combine [^`]+)`", text)
    assert command is not None
    beside(result, place, monkeypatch)
    assert main(command[1].split()) == 0, capsys.readouterr().err
    assert json.loads(Path("plain/adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == "LORA"


def test_what_is_no_change_of_weights_is_not_said_to_merge(place):
    text = made(place, "bottleneck", method="bottleneck", options={})[1]
    assert "it changes no weights, and works in Veneer only" in text and "veneer merge" not in text


def test_full_fine_tuning_loads_in_veneer_alone(place, monkeypatch, capsys):
    result, text = made(place, "full", method="full", options={}, lr=1e-3)
    assert (
        len(blocks(text)) == 1
        and "PeftModel" not in text
        and " --out merged` writes it into a copy of the base" in text
    )
    beside(result, place, monkeypatch)
    exec(blocks(text)[0], {})
    from veneer.cli.frame import main

    command = re.search(r"`veneer (merge [^`]+)`", text)
    assert command is not None and main(command[1].split()) == 0, capsys.readouterr().err


RECORD = {
    "layout": "peft",
    "options": {},
    "base": {},
    "allow": ["zero"],
    "sites": {"a": {"kind": "linear", "rank": 600, "norm": 1.0}},
}


@pytest.mark.parametrize(
    ("sites", "peft", "says"),
    [
        (
            {"kind": "linear", "rank": 600, "norm": 1.0},
            {"peft_type": "LORA"},
            "vLLM cannot serve it unchanged: rank 600 > 512, the largest",
        ),
        (
            {"kind": "conv", "rank": 4, "norm": 1.0},
            {"peft_type": "LORA"},
            "vLLM cannot adapt layers of the kind conv",
        ),
        ({"kind": "linear", "rank": 4, "norm": 1.0}, {"peft_type": "MISS"}, "vLLM reads plain LoRA alone"),
        (
            {"kind": "linear", "rank": 4, "norm": 1.0},
            {"peft_type": "LORA", "modules_to_save": ["score"]},
            "vLLM reads plain LoRA alone",
        ),
        ({"kind": "linear", "rank": 9, "norm": 1.0}, {"peft_type": "LORA"}, "--max-lora-rank 16"),
    ],
)
def test_only_ways_that_work_are_named(sites, peft, says):
    ways = usage.ways("builtin", "transformers.AutoModelForCausalLM", {**RECORD, "sites": {"a": sites}}, peft)
    assert len(ways) == 3 and says in ways[2]
    assert "veneer.load(model, \".\", allow=['zero'])" in ways[0] and "from veneer import embedded" in ways[0]


def test_a_card_that_cannot_be_written_is_said(place, monkeypatch, capsys):
    def full(*a: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(card, "write", full)
    fit(Run.from_dict(tiny.settings(place, out=str(place / "said"), steps=2, eval_every=1)))
    assert (
        "the run is finished and saved, but the adapter's README.md is not written: no space left"
        in capsys.readouterr().err
    )


def test_it_names_the_template_used_and_the_rows_left_out(place):
    rows = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"yes {i}"}]}
        for i in range(40)
    ]
    rows[1]["messages"][1]["content"] = "no " * 200
    rows[2]["messages"] = rows[2]["messages"][:1]
    talks = str(tiny.jsonl(place / "talks.jsonl", *rows))
    own = {"data": talks, "valid": talks, "known": "none", "length": 100, "report": False}
    _, text = made(place, "talks", **own)
    data = text.split("## Data\n")[1].split("\n## ")[0]
    why = "since the base's tokenizer lacks one"
    assert f"Conversations are rendered by the chat template 'plain', {why}, which is saved with" in data
    assert (
        "Left out: 1 train rows longer than 100 tokens, 1 train rows without anything to learn, 1 valid"
        in data
    )
    _, other = made(place, "chatml", **own, chat_template="chatml")
    assert "Conversations are rendered by the chat template 'chatml', which is saved with" in other
    assert "Conversations are" not in made(place, "lora")[1]
