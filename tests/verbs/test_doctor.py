"""The doctor: what it looks at, what it says is missing with the command that brings it, and its exit
codes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from veneer import embedded
from veneer.cli.frame import main
from veneer.embedded import texts
from veneer.errors import VeneerError
from veneer.verbs import doctor as module
from veneer.verbs import installed
from veneer.verbs.doctor import Check, Examination, doctor, text
from veneer.verbs.installed import Package, numbers, problem_of


def named(checks):
    return {c.name: c for c in checks}


def test_it_looks_at_everything_and_this_machine_is_well(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {c["name"] for c in found["checks"]}
    assert found["healthy"]
    assert {
        "veneer",
        "python",
        "torch",
        "safetensors",
        "transformers",
        "matplotlib",
        "cpu",
        "C++ compiler",
        "built-in model",
    } <= names
    assert {"built-in prose", "built-in C headers", "built-in known text"} <= names
    checks = {c["name"]: c for c in found["checks"]}
    assert "GB of memory available" in checks["cpu"]["found"] and "thread" in checks["cpu"]["found"]
    assert {p.name for f in installed.FEATURES for p in f.packages} | {"bitsandbytes", "torchao"} <= names


def test_the_packages_are_those_that_are_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"]
    for feature in installed.FEATURES:
        declared = extras[feature.extra] if feature.extra else project["dependencies"]
        own = {entry for entry in declared if not entry.startswith("veneer[")}
        assert {f"{p.name}>={p.least}" for p in feature.packages} == own
    own = {
        "all",
        "test",
        "dev",
        "docs",
    }  # collections of the others, and what is for those who work on Veneer
    assert {f.extra for f in installed.FEATURES} == {"", *extras} - own


def test_what_is_missing_old_or_broken_is_said_with_the_command(monkeypatch):
    versions = {"torch": "2.13.0+cpu", "safetensors": "0.4.1", "matplotlib": "3.9"}
    for place in (installed, module):
        monkeypatch.setattr(place, "version_of", versions.get)
    real = installed.importlib.import_module

    def broken(name):
        if name == "matplotlib":
            raise ImportError("no libfreetype\nand more")
        return real(name)

    monkeypatch.setattr(installed.importlib, "import_module", broken)
    found = named(module._packages())
    assert found["torch"] == Check("torch", True, "2.13.0+cpu (adapting models)", core=True)
    old = Check(
        "safetensors",
        False,
        "0.4.1 is older than 0.4.3 (adapting models)",
        "pip install 'safetensors>=0.4.3'",
        core=True,
    )
    assert found["safetensors"] == old
    assert found["transformers"] == Check(
        "transformers", False, "missing (language models and texts)", "pip install 'veneer[text]'"
    )
    said = "3.9 cannot be imported: ImportError: no libfreetype (pictures of reports)"
    assert found["matplotlib"] == Check("matplotlib", False, said, "pip install 'veneer[plots]'")


def test_a_library_of_quantised_layers_is_no_need(monkeypatch):
    monkeypatch.setattr(installed, "version_of", lambda name: None)
    monkeypatch.setattr(module, "version_of", lambda name: None)
    found = named(module._layers())
    cure = "pip install torchao, for a base in its format; --quantise works without"
    assert found["torchao"] == Check("torchao", False, "missing (its quantised layers)", cure, core=False)


def test_only_what_the_core_needs_makes_it_fail(monkeypatch, capsys):
    fine, missing = (
        Check("torch", True, "2.13", core=True),
        Check("plots", False, "missing", "pip install 'veneer[plots]'"),
    )
    for checks, code in (
        ([fine, missing], 0),
        ([fine._replace(fine=False, cure="pip install torch"), missing], 3),
    ):
        monkeypatch.setattr(module, "doctor", functools.partial(lambda found: found, Examination(checks)))
        assert main(["doctor"]) == code
        shown = capsys.readouterr().out
        assert "no  plots" in shown and "-> pip install 'veneer[plots]'" in shown
        assert ("the core works" in shown) == (code == 0) and ("NO  torch" in shown) == (code == 3)


def test_without_the_built_in_texts_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(texts, "has", lambda name: name == "prose")

    def none(split):
        raise texts.TextMissing("none of the held-out modules is here")

    monkeypatch.setattr(texts, "known", none)
    found = named(module._texts())
    assert found["built-in prose"].fine
    headers = Check(
        "built-in C headers", False, "missing from this interpreter (veneer demo)", "apt install python3-dev"
    )
    assert found["built-in C headers"] == headers
    assert not found["built-in known text"].fine and "held-out modules" in found["built-in known text"].found


def test_a_built_in_model_that_is_missing_or_damaged(monkeypatch, tmp_path):
    def missing():
        raise VeneerError("this installation has no built-in model")

    monkeypatch.setattr(embedded, "folder", missing)
    (check,) = module._model()
    assert not check.fine and not check.core and check.found == "this installation has no built-in model"
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(embedded, "folder", lambda: tmp_path)
    (check,) = module._model()
    assert not check.fine and "--force-reinstall" in check.cure


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    (check,) = module._compiler()
    assert (check.fine, check.cure, check.core) == (False, "apt install g++", False)


def test_versions_are_compared_as_numbers():
    assert (
        numbers("2.13.0+cpu") == (2, 13, 0)
        and numbers("0.4.3rc1") == (0, 4, 3)
        and numbers("2.9") < numbers("2.13")
    )
    assert problem_of(Package("no-such-package", "nothing", "1")) == "missing"
    assert text(Examination([])).endswith("the core works") and callable(doctor)
