"""Choices that are files: each folder lists its files by name and suggests the nearest name."""

from __future__ import annotations

import inspect

import pytest

from veneer import methods, optim, tasks
from veneer.errors import ConfigError
from veneer.methods import inits
from veneer.registry import Registry
from veneer.train import track


@pytest.mark.parametrize(
    ("folder", "file", "name", "wrong", "message"),
    [
        (methods, "lora.py", "lora", "lroa", "unknown method 'lroa'; did you mean 'lora'?"),
        (inits, "pissa.py", "pissa", "pisa", "unknown init 'pisa'; did you mean 'pissa'?"),
        (
            optim,
            "lora_muon.py",
            "lora-muon",
            "lora_muon",
            "unknown optimiser 'lora_muon'; did you mean 'lora-muon'?",
        ),
        (tasks, "causal_lm.py", "causal-lm", "causal", "unknown task 'causal'; did you mean 'causal-lm'?"),
        (track, "mlflow.py", "mlflow", "ml-flow", "unknown tracker 'ml-flow'; did you mean 'mlflow'?"),
    ],
)
def test_a_choice_is_known_by_its_files_name(folder, file, name, wrong, message):
    assert name in folder.available()
    assert inspect.getmodule(folder.get(name)).__file__.endswith(file)
    with pytest.raises(ConfigError) as refused:
        folder.get(wrong)
    assert str(refused.value) == message


def test_files_apart_are_no_choices_and_the_class_is_the_files_own(tmp_path, monkeypatch):
    folder = tmp_path / "flavours"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "base.py").write_text("class Flavour: ...\n")
    (folder / "dark_rum.py").write_text("from flavours.base import Flavour\n\nclass Rum(Flavour): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import flavours.base

    plain, dashed = (
        Registry("flavours", "flavour", apart=("base",), dashes=dashes) for dashes in (False, True)
    )
    assert plain.names() == ["dark_rum"] and dashed.names() == ["dark-rum"]
    assert plain.own_class("dark_rum", flavours.base.Flavour) is dashed.own_class(
        "dark-rum", flavours.base.Flavour
    )
    assert dashed.own_class("dark-rum", flavours.base.Flavour).__name__ == "Rum"
    with pytest.raises(ConfigError, match="unknown flavour 'vanilla'; known: dark-rum"):
        dashed.module("vanilla")
