"""Flags come from declarations, flags replace files, and every error is one message and an exit code."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.fresh import printed, python
from typer.testing import CliRunner

import veneer
from veneer import errors, methods, optim
from veneer.adapt.merge import Kept, Verdict
from veneer.cli import flags
from veneer.cli.app import app, beginning
from veneer.cli.frame import explain, main
from veneer.cli.panels import ORDER, OTHER
from veneer.cli.table import FIRST, VERBS
from veneer.cli.verb import GROUPS
from veneer.tasks.text.bits import BITS
from veneer.train.errors import Interrupted
from veneer.train.folder.result import Change, Result
from veneer.train.run import Run
from veneer.verbs.inspect import Inspection

RESULT = Result(
    Path("runs/notes"),
    {"learned": {"text": "valid"}, "seconds": 1.5},
    Change(2.0, 1.5),
    Change(1.0, 1.02),
    BITS,
)


@pytest.fixture
def started(monkeypatch):
    """The runs that `veneer fit` starts, in place of training."""
    runs: list[Run] = []
    stand_in = ModuleType("veneer.runs.fit")
    stand_in.fit = lambda run: runs.append(run) or RESULT
    monkeypatch.setitem(sys.modules, "veneer.runs.fit", stand_in)
    monkeypatch.delenv("VENEER_DEBUG", raising=False)
    return runs


def failing(monkeypatch, error):
    def fit(run):
        raise error

    stand_in = ModuleType("veneer.runs.fit")
    stand_in.fit = fit
    monkeypatch.setitem(sys.modules, "veneer.runs.fit", stand_in)
    monkeypatch.delenv("VENEER_DEBUG", raising=False)


@pytest.fixture
def called(monkeypatch):
    """Puts a stand-in with the same signature for a verb's function, which keeps what it was called with."""

    def put(verb, outcome, file=None):
        module = importlib.import_module(f"veneer.verbs.{file or verb}")
        calls: list[dict[str, object]] = []
        real = getattr(module, verb)
        monkeypatch.setattr(
            module, verb, functools.wraps(real)(lambda **given: calls.append(given) or outcome)
        )
        return calls

    return put


def test_every_setting_and_every_option_has_a_flag_with_help():
    made = {f.name: f for f in [*flags.of_settings(Run), *flags.of_methods(), *flags.of_optimisers()]}
    wanted = {f.name for f in dataclasses.fields(Run)} - {"options", "optimiser_options", "task_options"}
    wanted |= {f"{name}_{o}".replace("-", "_") for name in optim.available() for o in optim.options_of(name)}
    wanted |= {option for m in methods.available() for option in methods.options_of(methods.get(m))} | {
        "prefix_length"
    }
    assert set(made) == wanted
    assert [f.name for f in made.values() if not f.help.split(" [")[0]] == []
    assert all(flags.parsed(f.hint) for f in made.values())


def test_settings_come_as_python_would_give_them(started):
    line = "fit --data a.txt --data b.jsonl --lr 1e-3 --steps 7 --no-packing --betas 0.8 0.95"
    line += " --method dora --rank 4 --stabilised"
    assert (
        main(
            [
                *line.split(),
                "--rank-pattern",
                "q_proj=2",
                "--rank-pattern",
                ".*gate=1",
                "--schedule",
                "linear",
                "--seed",
                "3",
            ]
        )
        == 0
    )
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


def test_an_optimisers_option_bears_its_name(started, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("data: [a.txt]\noptimiser: loraplus\noptimiser_options: {ratio: 4}\n")
    assert main(["fit", "--config", str(file), "--loraplus-ratio", "8"]) == 0
    assert started == [Run(data=("a.txt",), optimiser="loraplus", optimiser_options={"ratio": 8.0})]
    assert main(["fit", "--data", "a.txt", "--loraplus-ratio", "8"]) == 2
    told = "--loraplus-ratio is an option of optimiser 'loraplus', but the optimiser is 'adamw'"
    assert f"{told}; use --optimiser loraplus or leave it out" in capsys.readouterr().err


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
    file.write_text(
        "data: [a.txt]\nlr: 1e-3\npacking: false\noptions: {rank: 4, init: pissa}\n"
        "rank_pattern: {q_proj: 2}\n"
    )
    assert main(["fit", "--config", str(file), "--rank", "16", "--steps", "9", "--data", "b.txt"]) == 0
    expected = Run(
        data=("b.txt",),
        lr=1e-3,
        packing=False,
        steps=9,
        options={"rank": 16, "init": "pissa"},
        rank_pattern={"q_proj": 2},
    )
    assert started == [expected]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fti", "No such command 'fti'. Did you mean 'fit'?\nsee veneer --help"),
        (
            "fit --rnk 3",
            "No such option: --rnk (Possible options: --lr, --rank, --track)\nsee veneer fit --help",
        ),
        ("fit --data a.txt --lr much", "Invalid value for '--lr'"),
        ("fit --data a.txt --schedule linaer", "Invalid value for '--schedule'"),
        ("fit --config nowhere.yaml", "nowhere.yaml"),
        ("fit", "error: --data must be given: texts to learn from"),
        (
            "fit --data a.txt --lr 0 --warmup -2",
            "--lr must be above 0, got 0\n--warmup must be 0 or more, got -2",
        ),
        ("fit --data a.txt --steps 3 --epochs 2", "--steps and --epochs both set the length"),
        ("fit --data a.txt --learning-rate 1e-3", "No such option: --learning-rate; it is called --lr here"),
        ("fit --data a.txt --lora_r 4", "No such option: --lora-r; it is called --rank here"),
        ("fit --data a.txt --method lorra", "unknown method 'lorra'; did you mean 'lora'?"),
        ("fit --data a.txt --method full --rank 3", "method 'full' has no option 'rank'"),
        (
            "fit --data a.txt --rank-pattern q_proj",
            "--rank-pattern must be NAME=VALUE with a whole number as value, such as q_proj=4, got 'q_proj'",
        ),
        ("fit --data a.txt --rank-pattern q_proj=x", "such as q_proj=4, got 'q_proj=x'"),
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
    assert "unknown setting 'rank'; put it inside options" in err


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


@pytest.mark.parametrize(
    ("given", "python", "flags"),
    [
        (("weight_decay",), "weight_decay", "--weight-decay"),
        (("force", True), "force=True", "--force"),
        (("packing", False), "packing=False", "--no-packing"),
        (("allow", "zero"), "allow='zero'", "--allow zero"),
        (("allow", ("base", "zero")), "allow=('base', 'zero')", "--allow base --allow zero"),
        (("length", 300), "length=300", "--length 300"),
        (("lr", 1e-3), "lr=0.001", "--lr 0.001"),
    ],
)
def test_an_error_names_settings_in_the_callers_language(given, python, flags):
    error = errors.ConfigError(f"x: pass {errors.option(*given)}, or leave it out")
    assert str(error) == f"x: pass {python}, or leave it out"
    assert explain(error) == (f"x: pass {flags}, or leave it out", 2)
    outer = errors.ConfigError(f"y: {error.text}")
    assert str(outer) == f"y: {error}" and explain(outer)[0] == f"y: x: pass {flags}, or leave it out"


def test_names_of_other_programs_are_understood(capsys, started, tmp_path):
    file = tmp_path / "run.yaml"
    names = "lora_alpha num_train_epochs per_device_train_batch_size max_seq_length output_dir".split()
    file.write_text("data: a.txt\n" + "".join(f"{name}: 1\n" for name in names))
    assert main(["fit", "--config", str(file)]) == 2
    told = capsys.readouterr().err.splitlines()
    for line, name, ours in zip(told, names, "alpha epochs batch length out".split(), strict=True):
        assert line.endswith(f"unknown setting {name!r}; it is called {ours!r} here")
    ours = {f.name for f in [*flags.of_settings(Run), *flags.of_methods(), *flags.of_optimisers()]}
    assert set(errors.PEERS.values()) <= ours and not ours & set(errors.PEERS)


def test_other_errors_are_two_lines_unless_debug_is_on(monkeypatch, capsys):
    failing(monkeypatch, KeyError("x"))
    line = ["fit", "--data", "a.txt"]
    assert main(line) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith("error: KeyError in test_cli.py, line ") and "--debug" in err and err.count("\n") == 2
    )
    for arguments in ([*line, "--debug"], ["--debug", *line]):
        assert main(arguments) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("VENEER_DEBUG", "1")
    assert main(line) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_missing_optional_package_says_what_to_install(monkeypatch, capsys):
    failing(monkeypatch, ModuleNotFoundError("No module named 'transformers'", name="transformers"))
    assert main(["fit", "--data", "a.txt"]) == 2
    assert (
        capsys.readouterr().err
        == "error: this needs the package 'transformers': pip install 'veneer[text]'\n"
    )


def test_ctrl_c_is_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["fit", "--data", "a.txt"]) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(("error", "line"), [(0.1, ""), (0.9, " --force")])
def test_merge_takes_adapters_by_place(called, capsys, error, line):
    verdict = Verdict([Kept("q_proj", 1.0, error)], error, None, 0.5)
    calls = called("merge", verdict)
    assert main(f"merge runs/a@0.5 runs/b --out merged --dtype float32{line}".split()) == 0
    assert calls == [
        {
            "adapter": ("runs/a@0.5", "runs/b"),
            "out": "merged",
            "dtype": "float32",
            **({"force": True} if line else {}),
        }
    ]
    assert capsys.readouterr().out == f"{verdict}\n"
    assert main(f"merge runs/a --out merged --json{line}".split()) == 0
    assert json.loads(capsys.readouterr().out) == verdict.as_dict()


def test_what_must_be_given_is_asked_for(capsys):
    assert main(["merge", "runs/a"]) == 2
    assert "Missing option '--out'" in capsys.readouterr().err
    assert main(["generate"]) == 2
    assert "Missing argument 'PROMPT'" in capsys.readouterr().err


def test_generate_shows_one_text_after_the_other(called, capsys):
    calls = called("generate", {"base": "x", "a at 0.5": "y"})
    assert main(["generate", "def f(", "--adapter", "runs/a@0.5", "--no-base", "--top_p", "0.9"]) == 0
    assert calls == [{"prompt": "def f(", "adapter": ("runs/a@0.5",), "base": False, "top_p": 0.9}]
    assert capsys.readouterr().out == "== base\nx\n\n== a at 0.5\ny\n"


def test_inspect_shows_a_table_or_json(called, capsys):
    found = Inspection(
        "a", "runs/a", "builtin", "lora", 10, 100, 1.0, [], {"bfloat16": 0.01}, {"bfloat16": True}
    )
    calls = called("inspect", found)
    assert main(["inspect", "runs/a", "--model", "m"]) == 0
    assert calls == [{"adapter": "runs/a", "model": "m"}] and "survives" in capsys.readouterr().out
    assert main(["inspect", "runs/a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["merge"] == {"bfloat16": 0.01}


def test_every_flag_made_from_a_function_has_help():
    files = {"demo": "demo.choice"}
    every = {"demo": ["progress"], "generate": [], "chat": [], "inspect": [], "merge": []}
    for verb, without in every.items():
        module = importlib.import_module(f"veneer.verbs.{files.get(verb, verb)}")
        made = flags.of_function(getattr(module, verb), without)
        assert [f"{verb} {f.name}" for f in made if not f.help.split(" [")[0]] == []


def test_demo_takes_what_is_given(called, capsys):
    calls = called("demo", {"methods": []}, "demo.choice")
    assert main("demo --steps 20 --out runs/short --fresh --json".split()) == 0
    assert calls == [{"steps": 20, "out": "runs/short", "fresh": True}] and json.loads(
        capsys.readouterr().out
    ) == {"methods": []}


def test_fit_says_what_it_led_to(started, capsys):
    assert main(["fit", "--data", "a.txt"]) == 0
    out = capsys.readouterr().out
    assert "learned (valid)    2.000 -> 1.500 bits per byte (-25.0%)" in out
    assert "forgotten (known)  1.000 -> 1.020 bits per byte (+2.0%)" in out and "runs/notes/adapter" in out
    assert main(["fit", "--data", "a.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "runs/notes", **RESULT.metrics}


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    assert f"veneer {verb}" in shown.output.split("Examples:")[1]


def test_an_option_says_of_each_method_what_it_is_there():
    made = {f.name: f for f in flags.of_methods()}
    rank = {text: names for names, _, text in (p.partition(": ") for p in made["rank"].help.split("\n\n"))}
    assert {"dora", "lora"} <= set(rank["r, at most min(out, in) [8]"].split(", "))
    assert "loraxs" in rank["r, at most min(out, in) [32]"].split(", ")
    assert {"dora", "lora"} <= set(made["stabilised"].owners) and "miss" not in made["stabilised"].owners
    assert made["init_options"].help == "options of the start by name, such as gamma=64"
    for flag in made.values():
        for owner in flag.owners:
            default = flags.shown_default(methods.options_of(methods.get(owner))[flag.key].default)
            own = [p for p in flag.help.split("\n\n") if owner in p.partition(": ")[0].split(", ")]
            assert default in (own[0] if own else flag.help)


def test_an_option_that_is_called_like_a_setting_bears_its_methods_name(started, capsys):
    assert main("fit --data a.txt --method prefix --length 64 --prefix-length 4 --seed 5".split()) == 0
    assert started == [Run(data=("a.txt",), method="prefix", length=64, seed=5, options={"length": 4})]
    assert main(["methods"]) == 0
    assert "  --prefix-length: p, the number of positions" in capsys.readouterr().out


def test_an_optimisers_option_is_told_without_the_next_one():
    made = {f.name: f for f in flags.of_optimisers()}
    assert made["galore_rank"].help == "of the subspace, or the whole space of a smaller weight [128]"


def test_help_keeps_square_brackets(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    share = flags.Flag("share", float, "in [bold] and [0, 1)", owners=("lora",), into=flags.METHOD)
    monkeypatch.setattr(flags, "of_methods", lambda: [share])
    assert "in [bold] and [0, 1)" in CliRunner().invoke(app, ["fit", "--help"]).output


def test_no_verb_shows_five_to_begin_with_by_group_and_is_exit_2(capsys):
    assert main([]) == 2
    shown = capsys.readouterr().out.splitlines()
    named = [line.split()[1] for line in shown if line.startswith("  veneer ")]
    assert len(FIRST) == 5 and set(named) == set(FIRST)
    assert [line for line in shown if line in GROUPS] == list(GROUPS)
    assert beginning().splitlines() == shown


def test_help_lists_every_verb_in_its_group(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["--help"]).output.splitlines()
    heads = [i for i, line in enumerate(shown) if any(f"─ {group} ─" in line for group in GROUPS)]
    listed = {}
    for group, at in zip(GROUPS, heads, strict=True):
        assert f"─ {group} ─" in shown[at]
        rows = shown[at + 1 : next(i for i in range(at, len(shown)) if shown[i].startswith("╰"))]
        listed |= {row[2:].split()[0]: group for row in rows}
    assert listed == {name: verb.group for name, verb in VERBS.items()}


def test_flags_of_fit_stand_in_panels_with_ten_to_begin_with(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["fit", "--help"]).output
    heads = [line[3:].partition(" ─")[0] for line in shown.splitlines() if line.startswith("╭─")]
    assert heads == [panel for panel in ORDER if panel != OTHER]
    first = shown.split("╭─")[1].splitlines()
    words = [line.split()[1] for line in first if line.startswith("│ --")]
    assert sorted(words) == sorted(
        f"--{n}" for n in "config data model method to lr steps batch out rank".split()
    )


def test_every_setting_of_a_run_has_a_panel():
    assert [f.name for f in flags.of_settings(Run) if f.panel not in ORDER or f.panel == OTHER] == []


def test_methods_lists_all_with_their_papers(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    listed = {m["name"]: m for m in found["methods"]}
    assert sorted(listed) == methods.available()
    assert (
        listed["lora"]["paper"] == "https://arxiv.org/abs/2106.09685"
        and "W' = W + s" in listed["lora"]["summary"]
    )
    assert {
        "name": "rank",
        "type": "a whole number",
        "default": 8,
        "help": "r, at most min(out, in)",
    } in listed["lora"]["options"]
    assert [i["name"] for i in found["inits"]] == methods.inits.available() and all(
        i["summary"] for i in found["inits"]
    )
    loraplus = next(o for o in found["optimisers"] if o["name"] == "loraplus")
    assert loraplus["paper"] == "https://arxiv.org/abs/2402.12354" and [
        o["name"] for o in loraplus["options"]
    ] == ["ratio"]
    assert main(["methods"]) == 0
    assert "--rank: r, at most min(out, in) [8]" in capsys.readouterr().out
    assert main(["methods", "loraga", "galore"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("how the factors of a low-rank method start (--init):\n  loraga: ")
    assert "  galore: " in shown and "lora: " not in shown
    assert main(["methods", "lroa", "galore", "pisa"]) == 2
    assert capsys.readouterr().err == (
        "error: no method, start or optimiser is called 'lroa'; did you mean 'lora'?\n"
        "no method, start or optimiser is called 'pisa'; did you mean 'pissa'?\n"
    )


def test_as_a_program():
    assert python("-m", "veneer", "--version").stdout == f"veneer {veneer.__version__}\n"
    done = python("-m", "veneer", "fti")
    assert done.returncode == 2 and done.stdout == "" and "Did you mean 'fit'?" in done.stderr


def test_help_loads_no_verb():
    code = "import sys; from veneer.cli.frame import main; code = main(); print(*sys.modules); sys.exit(code)"
    loaded = set(printed(code, "--help").splitlines()[-1].split())
    assert (
        not {"torch", "veneer.train", "veneer.data", "veneer.verbs", "transformers", "matplotlib", "yaml"}
        & loaded
    )


def test_the_library_alone_says_what_the_command_line_needs():
    done = python(
        "-c", "import sys; sys.modules['typer'] = None; from veneer.__main__ import main; sys.exit(main())"
    )
    assert done.returncode == 2
    assert done.stderr == "error: the command line needs the package 'typer': pip install 'veneer[cli]'\n"


def test_the_shell_completes_verbs_and_flags(monkeypatch):
    monkeypatch.setenv("_VENEER_COMPLETE", "complete_bash")
    for words, at, wanted in [("veneer gen", "1", "generate"), ("veneer merge runs/a --dt", "3", "--dtype")]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", at)
        shown = CliRunner().invoke(app, [], prog_name="veneer").output
        assert wanted in shown.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("veneer fi", ["fit", "fit-many"]),
        ("veneer fit --label", ["--label-smoothing"]),
        ("veneer fit --schedule co", ["cosine", "constant"]),
        ("veneer fit --method dor", ["dora"]),
        ("veneer fit --task sequence-", ["sequence-classification", "sequence-regression"]),
        ("veneer fit --optimiser lorap", ["loraplus", "lorapro"]),
        ("veneer data s", ["show"]),
    ],
)
def test_the_shell_completes_verbs_flags_and_values(monkeypatch, capsys, words, wanted):
    monkeypatch.setenv("_VENEER_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit):
        app(args=[], prog_name="veneer")
    assert capsys.readouterr().out.split() == wanted
