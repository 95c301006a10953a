"""`veneer eval`: figures against a calculation by hand, pairs of the same documents, and lm-eval's
benchmarks from a folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from support import tiny
from support.models import randomise
from support.tiny import jsonl

import veneer
from veneer.cli.frame import main
from veneer.data.pack import collate, pack
from veneer.data.pack import segments as cut
from veneer.data.tokens import Tokens
from veneer.errors import ConfigError, DataError
from veneer.models import pretrained
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import bits_per_byte, nats_by_window
from veneer.verbs.eval import benchmarks
from veneer.verbs.eval.evaluate import evaluate

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
{more}
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{a}}"
doc_to_target: g
metric_list: [{metric: acc}]"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, adapters of three methods, texts, and a folder with two tasks."""
    root = tmp_path_factory.mktemp("eval")
    tiny.base(root / "base")
    for name, method in (("a", "lora"), ("b", "dora"), ("whole", "full")):
        model = pretrained.causal_lm(str(root / "base"), torch.float32, torch.device("cpu"))
        if method == "full":
            whole(model, root / name)
            continue
        veneer.attach(model, method, name=name, rank=2)
        randomise(model, name)
        veneer.save(model, root / name, name)
    jsonl(root / "notes.jsonl", *({"text": tiny.text(i, 5 + 9 * i)} for i in range(10)))
    jsonl(
        root / "pairs.jsonl",
        *({"prompt": tiny.text(i, 4), "completion": tiny.text(50 + i, 3)} for i in range(9)),
    )
    (root / "one.txt").write_text(tiny.text(7, 300), encoding="utf-8")
    (root / "tasks").mkdir()
    rows = [{"q": tiny.text(i, 6).strip(), "a": ["moon", "cat", "old house"], "g": i % 3} for i in range(10)]
    file = jsonl(root / "tasks" / "rows.jsonl", *rows)
    for name, more in (("pick", CHOICE), ("roll", ROLLING)):
        (root / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=file, more=more))
    return root


def whole(model: torch.nn.Module, out: Path) -> None:
    """A change of every parameter, as method full keeps it."""
    from veneer.train import full

    before = {n: t.clone() for n, t in model.state_dict().items()}
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draw))
    full.as_change(model, before, "default")
    veneer.save(model, out)


def by_hand(place: Path, adapter: str | None, texts: list[tuple[str, str]], length: int) -> float:
    """Bits per byte of the second of each two texts after the first, and of the end token, in float64, a
    piece at a time."""
    model = pretrained.causal_lm(str(place / "base"), torch.float32, torch.device("cpu"))
    if adapter:
        veneer.load(model, place / adapter)
    model, tokenizer = model.double(), tiny.tokenizer()
    bits, n_bytes = 0.0, 0
    for read, learned in texts:
        start = [tokenizer.bos_token_id, *tokenizer(read).input_ids]
        ids = torch.tensor([*start, *tokenizer(learned).input_ids, tokenizer.eos_token_id])
        for at in range(0, len(ids) - 1, length):
            piece = ids[at : at + length + 1]
            with torch.no_grad():
                nats = -model(piece[None, :-1]).logits[0].log_softmax(-1).gather(1, piece[1:, None])[:, 0]
            bits += float(nats[max(0, len(start) - 1 - at) :].sum()) / math.log(2)
        n_bytes += len(learned.encode())
    return bits / n_bytes


def test_figures_are_those_by_hand(place):
    found = evaluate(
        str(place / "base"),
        adapter=[str(place / "a"), f"{place}/b", f"{place}/whole", f"{place}/a@0"],
        data=[str(place / "notes.jsonl"), str(place / "pairs.jsonl")],
        length=64,
        batch=3,
        device="cpu",
        progress=False,
    )
    notes, pairs = found.lines
    texts = [("", tiny.text(i, 5 + 9 * i)) for i in range(10)]
    asked = [(tiny.text(i, 4), tiny.text(50 + i, 3)) for i in range(9)]
    assert notes.base == pytest.approx(by_hand(place, None, texts, 64), rel=1e-5)
    assert pairs.base == pytest.approx(by_hand(place, None, asked, 64), rel=1e-5)
    assert list(notes.adapters) == ["a", "b", "whole", "a at 0"]
    for name in ("a", "b", "whole"):
        own = notes.adapters[name]
        assert own.value == pytest.approx(by_hand(place, name, texts, 64), rel=1e-5)
        assert (
            own.difference == pytest.approx(own.value - notes.base, rel=1e-9)
            and own.low < own.difference < own.high
        )
    assert notes.adapters["a at 0"] == (notes.base, 0.0, None, None)
    assert (notes.n, notes.units, notes.metric, notes.lower_is_better) == (
        10,
        "documents",
        "bits per byte",
        True,
    )
    assert found.notes == ["95 % intervals cover the choice of texts, not of the seed of the training"]


def test_long_rows_are_refused_cut_or_left_out_by_one_flag(place, tmp_path, capsys):
    rows = [{"prompt": tiny.text(i, 4), "completion": tiny.text(50 + i, 3)} for i in range(20)]
    long = {"prompt": tiny.text(7, 20), "completion": tiny.text(3, 30)}
    data = str(jsonl(tmp_path / "long.jsonl", *rows, long))
    given = [str(place / "base"), "--data", data, "--length", "40", "--device", "cpu"]
    assert main(["eval", *given]) == 1
    said = capsys.readouterr().err
    assert "long.jsonl line 21" in said and "or set --overlong to drop or cut" in said
    assert main(["eval", *given, "--overlong", "drop"]) == 0
    assert "1 of 21 rows are longer than length=40 tokens and left out" in capsys.readouterr().out
    cut = evaluate(given[0], data=[data], length=40, overlong="cut", device="cpu", progress=False)
    assert len(cut.lines) == 1


def test_documents_are_compared_in_pairs(place):
    """The documents differ much more than the models: an interval that forgot the pairs would be as wide
    as they are."""
    found = evaluate(
        str(place / "base"),
        adapter=[f"{place}/a@0.02"],
        data=[str(place / "notes.jsonl")],
        device="cpu",
        progress=False,
    )
    texts = [("", tiny.text(i, 5 + 9 * i)) for i in range(10)]
    alone = [by_hand(place, None, [t], 256) for t in texts]
    own = found.lines[0].adapters["a at 0.02"]
    assert own.high - own.low < 0.2 * (max(alone) - min(alone)) and own.low < own.difference < own.high


def test_of_few_documents_the_windows_are_drawn_and_of_a_handful_nothing(place):
    given = dict(adapter=[str(place / "a")], device="cpu", progress=False)
    found = evaluate(str(place / "base"), data=[str(place / "one.txt")], length=32, **given)
    line = found.lines[0]
    assert line.units == "windows" and line.n > 8 and line.adapters["a"].low is not None
    assert found.notes[0] == (
        f"{place}/one.txt: 1 documents are too few for an interval; it is over their windows, which are less"
        " independent"
    )
    some = evaluate(
        str(place / "base"), data=[str(place / "notes.jsonl")], documents=4, length=128, **given
    ).lines[0]
    assert some.n == 4 and some.units == "documents" and some.adapters["a"].low is None
    assert evaluate(
        str(place / "base"), data=[str(place / "one.txt")], device="cpu", progress=False
    ).notes == [found.notes[0]]


def test_the_table_and_json_say_the_same(place, capsys):
    words = [
        "eval",
        str(place / "base"),
        "--data",
        str(place / "pairs.jsonl"),
        "--adapter",
        str(place / "a"),
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert main([*words, "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]
    own = line["adapters"]["a"]
    assert "measuring the base: " in err and "measuring a: " in err
    assert f"bits per byte (lower is better; 9 documents): base {line['base']:.4f}" in out
    assert (
        f"a {own['value']:.4f}  difference {own['difference']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}]"
        in out
    )


def test_nats_by_window_are_those_of_the_whole(place):
    """Packed windows with masked stretches, in batches that mix lengths, with and without a head to cut
    off."""
    model = pretrained.causal_lm(str(place / "base"), torch.float32, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    every = []
    for n in (5, 31, 12, 50, 8, 3):
        ids = torch.randint(300, (n,), generator=draw)
        learned = torch.rand(n, generator=draw) < 0.7
        learned[-1] = True
        every += cut(Tokens(ids, learned, torch.ones(n, dtype=torch.int64)), 16)
    windows = pack(every, 24)
    model.train()
    found = nats_by_window(model, windows, next_token.nats, batch=3)
    assert model.training and found.dtype == torch.float64
    one_by_one = [next_token.loss(model.eval(), collate([w], 0))[0].item() for w in windows]
    torch.testing.assert_close(found, torch.tensor(one_by_one, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    total = sum(int(s.n_bytes.sum()) for w in windows for s in w)
    assert float(found.sum()) / math.log(2) / total == pytest.approx(
        bits_per_byte(model, windows, next_token.loss, batch=2), rel=1e-6
    )
    next_token._heads[model] = None  # as for a model whose head cannot be cut off
    torch.testing.assert_close(
        nats_by_window(model, windows, next_token.nats, batch=2), found, rtol=1e-5, atol=1e-5
    )


# -- benchmarks ----------------------------------------------------------------------------------------------


def picked(place: Path, adapter: str | None) -> float:
    """The share of questions whose right answer is the likeliest after the question, by hand."""
    model, tokenizer = (
        pretrained.causal_lm(str(place / "base"), torch.float32, torch.device("cpu")),
        tiny.tokenizer(),
    )
    if adapter:
        veneer.load(model, place / adapter)
    right = 0
    for line in (place / "tasks" / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = []
        for answer in row["a"]:
            before = tokenizer(row["q"]).input_ids
            ids = torch.tensor([*before, *tokenizer(f" {answer}").input_ids])
            with torch.no_grad():
                nats = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            scores.append(float(nats[len(before) - 1 :].sum()))
        right += scores.index(max(scores)) == row["g"]
    return right / 10


def test_benchmarks_of_a_folder_side_by_side(place, capfd, monkeypatch):
    monkeypatch.chdir(place)  # in no repository
    words = [
        "eval",
        str(place / "base"),
        "--adapter",
        str(place / "a"),
        "--tasks",
        "pi*",
        "--tasks",
        "roll",
        "--device",
        "cpu",
        "--json",
    ]
    torch.manual_seed(4)
    assert main([*words, "--task-folder", str(place / "tasks")]) == 0
    after = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(3))  # lm-eval sets seeds of its own
    out, err = capfd.readouterr()
    assert "fatal" not in err  # git, which lm-eval asks for a commit
    told = json.loads(out)
    lines = {(line["name"], line["metric"]): line for line in told["lines"]}
    pick, roll, words_ = (
        lines[k] for k in (("pick", "acc"), ("roll", "bits_per_byte"), ("roll", "word_perplexity"))
    )
    assert pick["base"] == picked(place, None) and pick["adapters"]["a"]["value"] == picked(place, "a")
    assert (
        not pick["lower_is_better"]
        and roll["lower_is_better"]
        and pick["n"] == 10
        and pick["units"] == "examples"
    )
    own = roll["adapters"]["a"]
    assert own["low"] < own["difference"] < own["high"] and own["difference"] == pytest.approx(
        own["value"] - roll["base"]
    )
    assert words_["adapters"]["a"]["low"] is None
    assert ("roll word_perplexity: without an interval, because it is not a mean over examples") in told[
        "notes"
    ]


def test_an_unknown_benchmark_is_refused_with_the_nearest(place, monkeypatch, capsys):
    from lm_eval import tasks

    def without_its_own(*, include_path, include_defaults=True):  # reading those takes seconds
        return manager(include_path=include_path, include_defaults=False)

    manager = tasks.TaskManager
    monkeypatch.setattr(tasks, "TaskManager", without_its_own)
    words = ["eval", str(place / "base"), "--task-folder", str(place / "tasks"), "--tasks"]
    assert main([*words, "pick", "--tasks", "rolll"]) == 3
    assert capsys.readouterr().err == "error: unknown benchmark 'rolll'; did you mean 'roll'?\n"
    assert main(["eval", str(place / "base"), "--tasks", "x", "--task-folder", str(place / "base")]) == 2
    assert (
        f"task_folder {place}/base must hold tasks of lm-eval (.yaml), got none; name another"
        in capsys.readouterr().err
    )
    assert benchmarks._near("zzzzzz", ["pick"]) == "; lm-eval ls tasks lists all"


def test_examples_that_cannot_be_had_are_said_by_task(place, tmp_path):
    (tmp_path / "gone.yaml").write_text(TASK.format(name="gone", file=tmp_path / "gone.jsonl", more=CHOICE))
    with pytest.raises(DataError) as e:
        evaluate(str(place / "base"), tasks=["gone"], task_folder=str(tmp_path), device="cpu", progress=False)
    first, second = str(e.value).splitlines()
    assert first.startswith("benchmark gone: its examples are missing (FileNotFoundError: ")
    assert (
        second == "examples come from the Hugging Face hub or its cache; task_folder takes tasks with"
        " files of your own"
    )


def test_without_lm_eval_the_extra_is_named(place, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(place / "base"), "--tasks", "arc_easy"]) == 2
    assert "this needs the package 'lm_eval': pip install 'veneer[eval]'" in capsys.readouterr().err


def test_all_that_is_wrong_with_the_words_is_said_at_once(place, capsys):
    with pytest.raises(ConfigError) as e:
        evaluate("builtin", length=0, documents=-1)
    assert str(e.value).splitlines() == [
        "nothing to measure: give texts by --data, or benchmarks by --tasks",
        "documents must be 0 or more, got -1",
        "length must be 1 or more, got 0",
    ]
    assert main(["eval", "builtin", "--data", "a.txt@2"]) == 2
    assert "a.txt@2: a measured text has no weight; remove @ and the number" in capsys.readouterr().err
    assert main(["eval", "builtin", "--data", str(place / "one.txt"), "--adapter", "gone"]) == 2
    assert "adapter gone: the folder does not exist" in capsys.readouterr().err
    long = jsonl(place / "long.jsonl", {"prompt": tiny.text(1, 50), "completion": "x"})
    assert main(["eval", str(place / "base"), "--data", str(long), "--length", "32"]) == 1
    assert "1 of 1 rows are longer than --length 32 tokens" in capsys.readouterr().err
