"""Number formats have a short and a long spelling, and every command takes both."""

from __future__ import annotations

import pytest
import torch

from veneer import dtypes
from veneer.errors import ConfigError
from veneer.train.run import Run


@pytest.mark.parametrize(("short", "long"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_both_spellings_are_one_format(short, long):
    assert dtypes.of_name(short) is dtypes.of_name(long) is getattr(torch, long)
    assert dtypes.short(getattr(torch, long)) == dtypes.in_short(long) == dtypes.in_short(short) == short


def test_other_formats_have_no_short_name():
    assert dtypes.short(torch.float64) is None and dtypes.in_short("auto") == "auto"


def test_an_unknown_format_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown dtype 'bf17'; did you mean 'bf16'\?"):
        dtypes.of_name("bf17")
    with pytest.raises(ConfigError, match=r"unknown dtype 'nf3'; did you mean 'nf4'\?"):
        dtypes.of_name("nf3", ("nf4",))


def test_a_run_takes_both_spellings_of_its_precision():
    assert Run(data=("x",), precision="float32") == Run(data=("x",), precision="fp32")
    assert Run.from_dict({"data": "x", "precision": "bfloat16"}).precision == "bf16"


@pytest.mark.parametrize("verb", ["merge", "eval", "export", "verify", "convert"])
def test_every_command_takes_both_spellings(verb, tmp_path, capsys):
    """A dtype is checked before anything else is looked up, so only an unknown one is named in the error."""
    from veneer.cli.frame import main

    given = {
        "merge": [str(tmp_path / "x"), "--out", str(tmp_path / "out")],
        "eval": [str(tmp_path / "x"), "--data", str(tmp_path / "none.txt")],
        "export": [str(tmp_path / "x"), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "out")],
        "verify": [str(tmp_path / "x")],
        "convert": [str(tmp_path / "x"), "--out", str(tmp_path / "out")],
    }[verb]
    for name in ("fp32", "float32", "bf16", "bfloat16"):
        assert main([verb, *given, "--dtype", name]) != 0
        assert "dtype" not in capsys.readouterr().err
    assert main([verb, *given, "--dtype", "fp23"]) == 2
    assert "unknown dtype 'fp23'" in capsys.readouterr().err
