"""A kind of changed base is one entry: files, errors and folders follow from it."""

from __future__ import annotations

import json

import pytest
from support import models
from torch import nn

import veneer
from veneer.adapt.store import fingerprint
from veneer.errors import FormatError
from veneer.sites import changed


class Halved(nn.Linear):
    """A layer of a kind that only this test knows."""


@pytest.fixture
def halved(monkeypatch):
    """A second kind of changed base, entered the way a third one would be."""

    def forms(model: nn.Module) -> dict[str, str]:
        return {n: "half" for n, m in model.named_modules() if isinstance(m, Halved)}

    def load(model: nn.Module, folder: object) -> nn.Module:
        return halve(model)

    monkeypatch.setattr(veneer, "load_halved", load, raising=False)
    entry = changed.Kind("halved", forms, "halved.json", "load_halved")
    monkeypatch.setattr(changed, "KINDS", (*changed.KINDS, entry))
    return entry


def halve(model: nn.Module) -> nn.Module:
    layer = model.model.layers[0].mlp.up_proj
    layer.__class__ = Halved
    return model


def test_a_plain_model_has_no_forms_and_a_quantised_one_has_its_format():
    assert changed.forms_of(models.llama()) == {}
    assert changed.forms_of(veneer.quantise(models.llama(), "nf4")) == {"quantised": ["nf4"]}


def test_the_manifest_and_its_errors_know_a_kind_from_its_entry(halved, tmp_path):
    model = halve(models.llama())
    assert fingerprint.measure(model)["halved"] == ["half"]
    veneer.attach(model, "lora", rank=2)
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "veneer.json").read_text())["base"]["halved"] == ["half"]
    told = r"the adapter's is halved \(half\), this model is plain; open the base from the folder"
    with pytest.raises(FormatError, match=told):
        veneer.load(models.llama(), tmp_path / "a")
    veneer.load(halve(models.llama()), tmp_path / "a")


def test_a_folder_is_opened_by_the_kind_whose_file_it_holds(halved, tmp_path):
    (tmp_path / "halved.json").write_text(json.dumps({"model": "where/it/came/from"}))
    assert changed.kind_of_folder(tmp_path) == halved
    assert changed.origin(str(tmp_path)) == "where/it/came/from"
    assert changed.forms_of(changed.load(models.llama(), tmp_path)) == {"halved": ["half"]}


def test_other_names_are_their_own_origin_and_hold_no_layers(tmp_path):
    assert changed.origin("some/model") == "some/model" and changed.kind_of_folder("some/model") is None
    with pytest.raises(FormatError, match=r"changed layers are missing; expected one of quantised\.json"):
        changed.load(models.llama(), tmp_path)


def test_a_folder_that_does_not_name_its_model_is_refused(tmp_path):
    (tmp_path / "quantised.json").write_text("{}")
    with pytest.raises(FormatError, match="lacks model"):
        changed.origin(str(tmp_path))
