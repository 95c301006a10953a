"""The command line: flags made from declarations, files under flags, and one clear message and exit code for every error."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType

import pytest
from fresh import printed, python
from typer.testing import CliRunner

import veneer
from veneer import errors, methods
from veneer.cli import flags
from veneer.cli.commands import app
from veneer.cli.frame import main
from veneer.train.errors import Interrupted
from veneer.train.run import Run


@pytest.fixture
def started(monkeypatch):
    """The runs that `veneer fit` starts, in place of training."""
    runs: list[Run] = []
    stand_in = ModuleType("veneer.app.fit")
    stand_in.fit = lambda run: runs.append(run) or {}
    monkeypatch.setitem(sys.modules, "veneer.app.fit", stand_in)
    monkeypatch.delenv("VENEER_DEBUG", raising=False)
    return runs


def failing(monkeypatch, error):
    def fit(run):
        raise error

    stand_in = ModuleType("veneer.app.fit")
    stand_in.fit = fit
    monkeypatch.setitem(sys.modules, "veneer.app.fit", stand_in)
    monkeypatch.delenv("VENEER_DEBUG", raising=False)


def test_every_setting_and_every_option_has_a_flag_with_help():
    made = {f.name: f for f in [*flags.of_settings(Run), *flags.of_methods()]}
    wanted = {f.name for f in dataclasses.fields(Run)} - {"options"}
    wanted |= {option for m in methods.available() for option in methods.options_of(methods.get(m))}
    assert set(made) == wanted
    assert [f.name for f in made.values() if not f.help.split(" (default")[0]] == []
    assert all(flags.parsed(f.hint) for f in made.values())


def test_settings_come_as_python_would_give_them(started):
    line = "fit --data a.txt --data b.jsonl --lr 1e-3 --steps 7 --no-packing --betas 0.8 0.95 --method dora --rank 4 --stabilised"
    assert main([*line.split(), "--rank-pattern", "q_proj=2", "--rank-pattern", ".*gate=1", "--schedule", "linear", "--seed", "3"]) == 0
    assert started == [
        Run(
            data=("a.txt", "b.jsonl"),
            lr=1e-3,
            steps=7,
            packing=False,
            betas=(0.8, 0.95),
            method="dora",
            options={"rank": 4, "stabilised": True},
            rank_pattern={"q_proj": 2, ".*gate": 1},
            schedule="linear",
            seed=3,
        )
    ]


def test_dashes_and_underscores_are_the_same(started):
    assert main(["fit", "--data", "a.txt", "--weight_decay", "0.1", "--no-packing"]) == 0
    assert main(["fit", "--data", "a.txt", "--weight-decay", "0.1", "--no_packing"]) == 0
    assert started[0] == started[1] == Run(data=("a.txt",), weight_decay=0.1, packing=False)


@pytest.mark.parametrize(
    ("entries", "to"),
    [
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["q_proj"], ("q_proj",)),
        (["q_proj,v_proj"], ("q_proj", "v_proj")),
        (["q_proj", "layers.0.mlp.gate"], ("q_proj", "layers.0.mlp.gate")),
    ],
)
def test_layers_are_an_expression_or_names(started, entries, to):
    assert main(["fit", "--data", "a.txt", *(word for e in entries for word in ("--to", e))]) == 0
    assert started[0].to == to


def test_flags_replace_the_file_and_only_those_that_are_given(started, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: [a.txt]\nlr: 1e-3\npacking: false\noptions: {rank: 4, init: pissa}\nrank_pattern: {q_proj: 2}\n")
    assert main(["fit", "--config", str(file), "--rank", "16", "--steps", "9", "--data", "b.txt"]) == 0
    expected = Run(data=("b.txt",), lr=1e-3, packing=False, steps=9, options={"rank": 16, "init": "pissa"}, rank_pattern={"q_proj": 2})
    assert started == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fti", "No such command 'fti'. Did you mean 'fit'?\nsee veneer --help"),
        ("fit --rnk 3", "No such option: --rnk (Possible options: --lr, --rank)\nsee veneer fit --help"),
        ("fit --data a.txt --lr much", "Invalid value for '--lr'"),
        ("fit --data a.txt --schedule linaer", "Invalid value for '--schedule'"),
        ("fit --config nowhere.yaml", "nowhere.yaml"),
        ("fit", "setting 'data' is missing"),
        ("fit --data a.txt --method lorra", "unknown method 'lorra'; did you mean 'lora'?"),
        ("fit --data a.txt --method full --rank 3", "method 'full' has no option 'rank'"),
        ("fit --data a.txt --rank-pattern q_proj", "rank_pattern 'q_proj' is not NAME=VALUE with a whole number as value, e.g. q_proj=4"),
        ("fit --data a.txt --rank-pattern q_proj=x", "rank_pattern 'q_proj=x' is not NAME=VALUE"),
    ],
)
def test_wrong_usage_is_exit_2_with_advice(started, capsys, line, message):
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert out == "" and started == []


def test_an_unknown_key_of_a_file_is_refused_with_the_nearest(started, capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: a.txt\nschedul: linear\nrank: 4\n")
    assert main(["fit", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert "unknown setting 'schedul'; did you mean 'schedule'?" in err
    assert "unknown setting 'rank'; it belongs into options" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.SiteError("no layer\nat all"), 1),
        (errors.ConfigError("no such thing"), 2),
        (errors.NotMergeable("lost"), 3),
        (Interrupted("saved at step 3", 2), 130),
        (Interrupted("saved at step 3", 15), 143),
    ],
)
def test_foreseen_errors_are_their_message_and_their_exit_code(monkeypatch, capsys, error, code):
    failing(monkeypatch, error)
    assert main(["fit", "--data", "a.txt"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_errors_are_two_lines_unless_debug_is_on(monkeypatch, capsys):
    failing(monkeypatch, KeyError("x"))
    line = ["fit", "--data", "a.txt"]
    assert main(line) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: KeyError in test_cli.py, line ") and "--debug" in err and err.count("\n") == 2
    for arguments in ([*line, "--debug"], ["--debug", *line]):
        assert main(arguments) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("VENEER_DEBUG", "1")
    assert main(line) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_missing_optional_package_says_what_to_install(monkeypatch, capsys):
    failing(monkeypatch, ModuleNotFoundError("No module named 'transformers'", name="transformers"))
    assert main(["fit", "--data", "a.txt"]) == 2
    assert capsys.readouterr().err == "error: this needs the package 'transformers': pip install 'veneer[text]'\n"


def test_ctrl_c_is_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["fit", "--data", "a.txt"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "methods"])
def test_help_has_examples(monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert f"veneer {verb}" in shown.output.split("Examples:")[1]


def test_help_keeps_square_brackets(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(flags, "of_methods", lambda taken=(): [flags.Flag("share", float, "in [bold] and [0, 1)", owners=("lora",))])
    assert "in [bold] and [0, 1)" in CliRunner().invoke(app, ["fit", "--help"]).output


def test_no_verb_is_help_and_exit_2(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert "fit" in shown and "methods" in shown


def test_methods_lists_all_with_their_papers(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    listed = {m["name"]: m for m in found["methods"]}
    assert sorted(listed) == methods.available()
    assert listed["lora"]["paper"] == "https://arxiv.org/abs/2106.09685" and "W' = W + s" in listed["lora"]["summary"]
    assert {"name": "rank", "type": "a whole number", "default": 8, "help": "r, at most min(out, in)"} in listed["lora"]["options"]
    assert [i["name"] for i in found["inits"]] == methods.inits.available() and all(i["summary"] for i in found["inits"])
    assert main(["methods"]) == 0
    assert "--rank: r, at most min(out, in) (default: 8)" in capsys.readouterr().out


def test_as_a_program():
    assert python("-m", "veneer", "--version").stdout == f"veneer {veneer.__version__}\n"
    done = python("-m", "veneer", "fti")
    assert done.returncode == 2 and done.stdout == "" and "Did you mean 'fit'?" in done.stderr


def test_help_loads_no_verb():
    code = "import sys; from veneer.cli.frame import main; code = main(); print(*sys.modules); sys.exit(code)"
    loaded = set(printed(code, "--help").splitlines()[-1].split())
    assert not {"veneer.train", "veneer.data", "veneer.app", "transformers", "matplotlib", "yaml"} & loaded


def test_the_library_alone_says_what_the_command_line_needs():
    done = python("-c", "import sys; sys.modules['typer'] = None; from veneer.__main__ import main; sys.exit(main())")
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs the package 'typer': pip install 'veneer[cli]'\n"
