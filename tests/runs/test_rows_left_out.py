"""Rows that do not fit a run: left out, cut or refused by its settings, counted, and named in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.objectives import causal_lm

from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.runs.texts import texts
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

PAIRS = [{"prompt": f"q {i}: ", "completion": f"yes {i}"} for i in range(24)]
LONG = {"prompt": "q", "completion": "no " * 40}  # of 1 + 40 * 3 + 1 predictions
LATE = {"prompt": "why " * 40, "completion": "so"}
EMPTY = {"prompt": "x", "completion": ""}
N = 1 + 40 * 3 + 1


@pytest.fixture
def given(tmp_path) -> dict[str, Any]:
    base = tiny.base(tmp_path / "base")
    return {"model": str(base), "steps": 2, "length": 32, "known": "none", "report": False, "device": "cpu",
            "precision": "fp32", "batch": 2, "out": str(tmp_path / "run")}  # fmt: skip


def trained(given: dict[str, Any], *rows: dict[str, Any], **more: Any) -> list[str]:
    """The notes of a run on these rows."""
    data = str(tiny.jsonl(Path(given["out"]).parent / "a.jsonl", *rows))
    run = Run.from_dict({**given, "data": data, "valid": data, **more})
    return fit(run, progress=False).metrics["notes"]


def test_long_and_empty_rows_are_left_out_and_named(given):
    notes = trained(given, *PAIRS, LONG, EMPTY)
    data = Path(given["out"]).parent / "a.jsonl"
    for part in ("train", "valid"):
        assert f"{part}: 1 of 26 rows are longer than length=32 tokens and left out: {data} line 25" in notes
        assert f"{part}: 1 of 26 rows have nothing to learn and are left out: {data} line 26" in notes
    kept = json.loads((Path(given["out"]) / "rows.json").read_text())
    assert kept["train"] == {"overlong": [f"{data} line 25"], "empty": [f"{data} line 26"], "cut": []}
    facts = json.loads((Path(given["out"]) / "config.json").read_text())["data"]["train"]
    assert (facts["rows"], facts["overlong"], facts["empty"]) == (24, 1, 1)


def test_a_run_that_uses_all_rows_says_nothing_of_it(given):
    notes = trained(given, *PAIRS)
    assert not any("left out" in note for note in notes) and not (Path(given["out"]) / "rows.json").exists()


def test_long_rows_are_cut_but_not_their_whole_answer(given):
    notes = trained(given, *PAIRS, LONG, LATE, overlong="cut")
    data = Path(given["out"]).parent / "a.jsonl"
    assert f"train: 1 of 26 rows are longer than length=32 tokens and cut: {data} line 25" in notes
    assert f"train: 1 of 26 rows are longer than length=32 tokens and left out: {data} line 26" in notes


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (
            [*PAIRS, LONG],
            {"overlong": "error"},
            f"train: 1 of 25 rows are longer than length=32 tokens: DATA line 25"
            f" ({N}); use length={N}, shorten them, or set overlong to drop or cut",
        ),
        (
            [*PAIRS, EMPTY],
            {"empty": "error"},
            "train: 1 of 25 rows have nothing to learn (every label is masked): DATA"
            " line 25; give them a completion, use train_on='all', or set empty='drop'",
        ),
        (
            [*PAIRS, *[LONG] * 3],
            {},
            f"train: 3 of 27 rows are longer than length=32 tokens: DATA line 25 ({N}), DATA line"
            f" 26 ({N}), DATA line 27 ({N}); at most 10% may be left out: use length={N}, set overlong='cut',"
            f" or shorten them",
        ),
        (
            [*PAIRS, *[EMPTY] * 3],
            {},
            "train: 3 of 27 rows have nothing to learn (every label is masked): DATA line 25,"
            " DATA line 26, DATA line 27; at most 10% may be left out: give them a completion or use"
            " train_on='all'",
        ),
        ([EMPTY], {}, "DATA: all 1 rows are empty: nothing to learn"),
    ],
)
def test_too_many_rows_or_stricter_settings_stop_a_run(given, rows, more, message):
    with pytest.raises(DataError) as e:
        trained(given, *rows, **more)
    data = str(Path(given["out"]).parent / "a.jsonl")
    assert str(e.value).replace(data, "DATA").splitlines()[0] == message
    assert not Path(given["out"]).exists()


def test_a_tenth_of_the_rows_may_be_left_out(given):
    assert any("3 of 30 rows are longer" in note for note in trained(given, *PAIRS, *PAIRS[:3], *[LONG] * 3))


def test_length_is_chosen_from_the_rows_and_said(given):
    notes = trained(given, *PAIRS, length="auto")
    assert next(n for n in notes if n.startswith("length")).startswith(
        "length 128 (auto): rows have 13 tokens at the"
    )
    assert (
        json.loads((Path(given["out"]) / "config.json").read_text())["run"]["length"] == 128
    )  # the base's context


def test_an_undecided_length_is_not_used():
    with pytest.raises(ConfigError, match="length is 'auto' and not decided yet"):
        texts.prepare([], causal_lm(tiny.tokenizer(), length="auto"), Notes())


def test_a_run_goes_on_with_the_length_that_it_began_with(given):
    """A run of an earlier release, whose default was a number, is resumed without naming it."""
    trained(given, *PAIRS, length=48, save_every=1)
    out = Path(given["out"])
    config = json.loads((out / "config.json").read_text())
    for name in ("overlong", "empty", "columns", "prompt_template", "chat_template", "train_turns"):
        del config["run"][name]
    config["run"]["allow"] = ["truncate"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "results.json").unlink()
    notes = trained({**given, "length": "auto"}, *PAIRS, save_every=1, resume=True, overlong="cut")
    assert any(note.startswith("resumes at step") for note in notes)
    with pytest.raises(ConfigError, match="length: 48 -> 64"):
        trained({**given, "length": 64}, *PAIRS, save_every=1, resume=True, overlong="cut")


def test_a_check_that_is_a_setting_now_is_named():
    with pytest.raises(
        ConfigError, match="allow: 'truncate' is a setting of its own now; set overlong='cut'"
    ):
        Run(data="a.jsonl", allow=("truncate",))


def test_without_valid_text_all_rows_are_learned_and_the_last_step_is_kept(given):
    data = str(tiny.jsonl(Path(given["out"]).parent / "a.jsonl", *PAIRS))
    result = fit(
        Run.from_dict({**given, "data": data, "valid": "none", "steps": 6, "eval_every": 2, "lr": 0.5}),
        progress=False,
    )
    facts = json.loads((Path(given["out"]) / "config.json").read_text())["data"]
    assert facts["train"]["rows"] == 24 and facts["valid"]["rows"] == 2
    assert result.metrics["best_step"] == 6
    assert any(
        n.startswith("valid is 'none': all 24 rows are learned and the last step is kept;")
        for n in result.metrics["notes"]
    )
    assert not any("learned from too" in n for n in result.metrics["notes"])


def test_measured_rows_that_are_learned_too_are_said(given, tmp_path):
    test = str(tiny.jsonl(tmp_path / "t.jsonl", PAIRS[3], {"prompt": "new", "completion": "no"}))
    notes = trained(given, *PAIRS, test=test)
    assert f"test: 1 rows are learned from too: {test} line 1; their figures flatter" in notes
    assert any(n.startswith("valid: 24 rows are learned from too: ") for n in notes)
    other = str(tiny.jsonl(tmp_path / "v.jsonl", {"prompt": "new", "completion": "no"}))
    clean = trained({**given, "out": str(tmp_path / "two")}, *PAIRS, valid=other)
    assert not any("learned from too" in n for n in clean)


def test_columns_and_templates_are_settings_of_a_run(given, tmp_path):
    rows = [{"question": f"q {i}", "choice": i, "id": i} for i in range(24)]
    notes = trained(given, *rows, columns={"completion": "choice"}, prompt_template="Q: {question}\\nA: ")
    assert "unused columns: id" in notes
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talks = [{"question": f"q {i}", "answer": f"a {i}"} for i in range(24)]
    out = tmp_path / "two"
    trained({**given, "out": str(out)}, *talks, chat_template=str(template))
    assert (out / "adapter" / "chat_template.jinja").read_text() == template.read_text()
    notes = trained({**given, "out": str(tmp_path / "three")}, *talks, chat_template="chatml", length=96)
    assert (
        "chat_template 'chatml' uses <|im_end|>, <|im_start|>, which this tokenizer spells out in several"
        " tokens" in notes
    )
    with pytest.raises(
        ConfigError, match="chat_template must be a file or a name, got 'chatlm'; did you mean 'chatml'"
    ):
        trained({**given, "out": str(tmp_path / "four")}, *talks, chat_template="chatlm")


def test_the_plain_template_is_said_and_saved(given):
    notes = trained(given, *({"question": f"q {i}", "answer": f"a {i}"} for i in range(24)))
    assert any(
        n.startswith("the tokenizer has no chat template: conversations are written by 'plain'")
        for n in notes
    )
    saved = (Path(given["out"]) / "adapter" / "chat_template.jinja").read_text()
    assert "### assistant" in saved and saved.startswith("{{- bos_token }}")
