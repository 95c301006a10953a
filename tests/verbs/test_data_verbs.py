"""veneer data show and check: what they count and find, against rows whose figures are known by hand."""

from __future__ import annotations

import copy
import json
import re

import pytest
from support import tiny
from support.objectives import causal_lm

from veneer.cli import coloured_tokens
from veneer.cli.frame import main
from veneer.data import leaks
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.models import pretrained
from veneer.runs.texts import texts
from veneer.tasks.text import preview, survey
from veneer.train.loop.progress import Notes
from veneer.train.run import Run
from veneer.verbs.data import check, show

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


@pytest.fixture
def by(monkeypatch):
    """The tiny tokenizer stands for the model's."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    monkeypatch.setattr(pretrained, "processor", lambda name, kind: tokenizer)
    return tokenizer


def pairs(path, *found):
    return str(tiny.jsonl(path, *({"prompt": p, "completion": c} for p, c in found)))


def run(data, **more):
    return Run(data=data, model="tiny", **more)


# -- show ----------------------------------------------------------------------------------------------------
# ---------


PREFERRED = {"prompt": "Q: the cat?", "chosen": " sat", "rejected": " ran away"}


def test_show_gives_both_answers_of_a_preference(by, tmp_path, capsys):
    equal = {**PREFERRED, "rejected": " sat"}
    data = str(tiny.jsonl(tmp_path / "a.jsonl", PREFERRED, equal))
    assert main(["data", "show", data, "--task", "dpo", "--length", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["where"].rpartition(", ")[2] for row in found["rows"]] == ["chosen", "rejected"]
    for row, answer in zip(found["rows"], (" sat", " ran away"), strict=True):
        assert "".join(t["text"] for t in row["tokens"]) == f"<|end|>Q: the cat?{answer}<|end|>"
        assert "".join(t["text"] for t in row["tokens"] if t["learned"]) == f"{answer}<|end|>"
    assert any("answers that are equal" in said for said in found["notes"])
    assert main(["data", "show", data, "--task", "dpo", "--length", "32"]) == 0
    assert "⟦ ran away" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_check_counts_preferences_by_answer(by, tmp_path, task):
    other = {"prompt": "A", "chosen": "b", "rejected": "c"}
    rows = [PREFERRED, PREFERRED, *({**other, "prompt": f"A{i}"} for i in range(10))]
    data = str(tiny.jsonl(tmp_path / "a.jsonl", *rows))
    found = check.check(run(data, task=task, length=32, valid=("none",), batch=4))
    train = found.parts["train"]
    assert (train["rows"], train["examples"], train["duplicates"]) == (12, 24, 1)
    n = [
        len(by(f"<|end|>{r['prompt']}{r[k]}<|end|>").input_ids) for r in rows for k in ("chosen", "rejected")
    ]
    assert train["tokens"] == sum(n) and found.epoch["tokens"] == sum(n) - 24
    assert train["learned"] == found.epoch["learned"] > 0
    assert found.epoch["windows"] == 24 and found.epoch["steps"] == (3 if task == "dpo" else 6)


def test_show_gives_every_token_and_what_is_learned(by, tmp_path):
    data = pairs(tmp_path / "a.jsonl", ("Q: the cat?", " ä😀\n"), *((str(i), "x") for i in range(3)))
    valid = pairs(tmp_path / "v.jsonl", ("v", "v"))
    found = show.show(run(data, valid=valid, length=8), 1)
    (row,) = found["rows"]
    assert (row["kind"], row["too_long"], found["of"]) == ("pair", True, 4)
    assert "".join(t["text"] for t in row["tokens"]) == "<|end|>Q: the cat? ä😀\n<|end|>"
    assert "".join(t["text"] for t in row["tokens"] if t["learned"]) == " ä😀\n<|end|>"
    assert (row["length"], row["learned"]) == (len(row["tokens"]), sum(t["learned"] for t in row["tokens"]))
    assert found["notes"] == ["forgetting is not measured: no known text is given"]
    assert show.show(run(data))["of"] == 4  # none is set aside to choose by
    with pytest.raises(ConfigError, match="rows=0 must be 1 or more"):
        show.show(run(data), 0)


def test_the_first_token_is_shown_as_not_learned(by, tmp_path):
    by.bos_token = None
    (tmp_path / "a.txt").write_text(tiny.text(0, 400))
    (row,) = show.show(run(str(tmp_path / "a.txt")))["rows"]
    assert [t["learned"] for t in row["tokens"]].count(False) == 1 and not row["tokens"][0]["learned"]


@pytest.mark.parametrize("text", ["a😀b", "ä" * 9, "\ufffd\ufffdx", "日本語 text", " the cat"])
def test_pieces_are_the_text(text):
    ids = tiny.tokenizer()(text)["input_ids"]
    found = preview.pieces(ids, tiny.tokenizer())
    assert len(found) == len(ids) and "".join(found) == text


FOUND = {"shown": 1, "of": 1, "length": 4, "notes": ["a row is left out"], "rows": [
    {"where": "w", "length": 4, "learned": 2, "too_long": True, "spelt": {},
    "tokens": [
    {"text": "a", "learned": False},
    {"text": "\n", "learned": True},
    {"text": "[b]", "learned": True},
    {"text": "c", "learned": False},
]}]}  # fmt: skip


def test_the_mask_is_colour_or_marks():
    plain = coloured_tokens.text(FOUND, False)
    head, row, note = plain.split("\n\n")
    assert head == "the first 1 of 1 rows; learned tokens are between ⟦ and ⟧" and note == "a row is left out"
    assert row == "w: 4 tokens, 2 learned, longer than --length 4\na⟦\n[b]⟧c"
    line = coloured_tokens.text(FOUND, True).partition("--length 4\n")[2].partition("\n\n")[0]
    assert re.sub(r"\x1b\[[\d;]*m", "", line) == "a↵\n[b]c"
    assert re.findall(r"\x1b\[([\d;]*)m(\[b\]|c)", line) == [("30;42", "[b]"), ("2", "c")]


def test_no_colour_when_not_wanted(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured_tokens.has_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured_tokens.has_colour()
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.delenv("NO_COLOR")
    assert not coloured_tokens.has_colour()  # what pytest captures is no terminal


# -- check


def test_check_counts_what_is_read(by, tmp_path):
    data = pairs(tmp_path / "a.jsonl", ("x", "y"), ("x", "y"), ("x", "zz"))
    valid = pairs(tmp_path / "v.jsonl", ("v", "w"))
    found = check.check(run(f"{data}@2", valid=valid, length=16, batch=2))
    n = 4 + 4 + 3 + len(by("zz")["input_ids"])  # <end> x y <end>
    train = found.parts["train"]
    assert (train["rows"], train["tokens"], train["learned"], train["duplicates"]) == (3, n, n - 6, 1)
    assert train["lengths"] == {8: 3} and train["length"]["least"] == 4
    assert found.epoch["tokens"] == 2 * (n - 3) and found.epoch["learned"] == 2 * (n - 6)
    assert (found.epoch["windows"], found.epoch["steps"]) == (2, 1) and found.epoch["filled"] == 2 * (
        n - 3
    ) / 32
    assert found.wrong == [] and "train: 1 rows occur more than once" in found.notes
    assert any("an epoch has 6 rows" in note for note in found.notes)
    assert "nothing is wrong" in check.text(found)


def test_check_finds_what_is_wrong(by, tmp_path):
    data = pairs(tmp_path / "a.jsonl", ("p", LONG), ("same", "same"), ("x " * 40, "y"))
    valid = pairs(
        tmp_path / "v.jsonl", ("other", LONG.upper() + " fifteen"), ("same", "same"), ("q", "other " * 20)
    )
    found = check.check(run(data, valid=valid, length=256))
    where = str(tmp_path / "v.jsonl")
    assert found.parts["valid"]["leaks"] == {"equal": 1, "alike": 1}
    assert f"valid: 1 rows are learned from too: {where} line 2" in found.wrong
    assert any(
        w.startswith("valid: 1 rows share at least half") and w.endswith(f"{where} line 1")
        for w in found.wrong
    )
    cut = check.check(run(data, valid=valid, length=20, overlong="cut"))
    assert cut.wrong[0].startswith(
        f"train: 1 of 3 rows have their whole answer beyond length=20 tokens: {data} line 3 (82); at most"
        f" 10% may"
    )
    assert cut.parts["train"]["too_long"] == 2 and not any("longer than" in w for w in cut.wrong)


def test_rows_whose_every_label_is_masked_stop_a_run_and_are_shown(by, tmp_path):
    """trl 6668, unsloth 1290, 2771, 2900: a loss of 0 that looks like success."""
    talk = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    data = str(tiny.jsonl(tmp_path / "a.jsonl", talk))
    by.chat_template = (
        "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% generation %}{% endgeneration %}"
    )
    given = run(data, valid=data)
    with pytest.raises(DataError, match="text: 1 of 1 rows have nothing to learn"):
        rows = texts.gather(given, Notes())["train"]
        texts.prepare(rows, causal_lm(by, length=16), Notes())
    assert show.show(given)["rows"][0]["learned"] == 0
    assert check.check(given).wrong[0] == (
        f"train: 1 of 1 rows have nothing to learn (every label is masked): {data} line 1; at most 10% may"
        f" be left out:"
        f" give them a completion or use train_on='all'"
    )


def test_rows_that_are_too_long_are_wrong_unless_they_may_be_cut(by, tmp_path):
    data, valid = pairs(tmp_path / "a.jsonl", ("p", LONG)), pairs(tmp_path / "v.jsonl", ("a", "b"))
    assert check.check(run(data, valid=valid, length=20)).wrong == [
        f"train: 1 of 1 rows are longer than length=20 tokens: {data} line 1 (66); at most 10% may be left"
        f" out:"
        f" use length=66, set overlong='cut', or shorten them"
    ]
    assert check.check(run(data, valid=valid, length=20, overlong="cut")).wrong == []


def test_markers_that_leave_the_end_of_a_turn_out_are_wrong(by, tmp_path):
    talk = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    data, valid = (str(tiny.jsonl(tmp_path / name, talk)) for name in ("a.jsonl", "v.jsonl"))
    body = "{% generation %}{{ m.content }}{% endgeneration %}<|end|>"
    by.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + body
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    wrong = check.check(run(data, valid=valid)).wrong
    assert (
        f"train: in 1 conversations no end of a turn is learned: {data} line 1; the markers of the chat"
        f" template should" in wrong[0]
    )
    by.chat_template = by.chat_template.replace(
        body, "{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    )
    assert not any("no end" in w for w in check.check(run(data, valid=valid)).wrong)


def test_runs_of_words_by_hand():
    train = [Row("text", {"text": LONG.upper(), "id": 1}, "a")]
    texts = {
        "equal": LONG.upper(),
        "alike": LONG,
        "short": "one two",
        "half": f"{LONG} a b",
        "less": f"{LONG} a b c",
    }
    rows = [Row("text", {"text": text, "id": 2}, where) for where, text in texts.items()]
    # Of 2 runs 2, of 4 runs 2, of 5 runs 2.
    assert leaks.find(train, {"valid": rows}) == {"valid": (["equal"], ["alike", "half"])}


def test_only_what_is_learned_is_compared():
    talk = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "x"}]
    train = [Row("pair", {"prompt": "q", "completion": LONG}, "a"), Row("messages", {"messages": talk}, "b")]
    pair = Row("pair", {"prompt": LONG, "completion": "other"}, "pair")
    other = [{"role": "user", "content": "y"}, {"role": "assistant", "content": LONG}]
    found = leaks.find(train, {"test": [pair, Row("messages", {"messages": other}, "talk")]})
    assert found["test"] == ([], ["talk"])


def test_lengths_in_doublings():
    assert survey.histogram([2, 8, 9, 16, 17, 70]) == {8: 2, 16: 2, 32: 1, 64: 0, 128: 1}


# -- the command line


def test_the_verb_says_no_by_exit_code_3(by, tmp_path, capsys):
    data, valid = pairs(tmp_path / "a.jsonl", ("p", "c")), pairs(tmp_path / "v.jsonl", ("a", "b"))
    assert main(["data", "check", data, "--valid", valid, "--model", "tiny"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["data", "check", data, "--valid", data, "--model", "tiny", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["valid"]["leaks"]["equal"] == 1 and found["wrong"]
    assert main(["data", "show", "--data", data, "--valid", valid, "--model", "tiny", "--rows", "1"]) == 0
    assert "p⟦c<|end|>⟧" in capsys.readouterr().out
    assert main(["data", "show", data, "--valid", valid, "--model", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["learned"] == 2
    assert main(["data", "shw", data]) == 2
    assert main(["data", "check"]) == 2


def test_a_file_of_one_row_is_shown(tmp_path):
    """A training needs a second row to set aside; looking needs none."""
    data = str(tiny.jsonl(tmp_path / "one.jsonl", {"prompt": "the cat", "completion": " sat"}))
    found = show.show(Run(data=data, length=64))
    assert (found["shown"], found["of"], len(found["rows"])) == (1, 1, 1)
    assert not any("valid" in said for said in found["notes"])
