"""Lists the kinds of bases whose layers were changed after loading: how to recognise, describe and open each.

A kind is one entry of KINDS. Its functions that write or read such layers belong to higher rooms and are
called by their public names in `veneer`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import files
from veneer.errors import FormatError
from veneer.sites.factored.site import factored_forms
from veneer.sites.quantised import formats


class Kind(NamedTuple):
    """One way in which a base differs from the model that it was made from.

    name: the key in veneer.json's "base", an adjective. forms: the form of every changed layer by the layer's
    name, such as "nf4"; empty for a plain model. marker: the JSON file by which a folder of such layers is
    recognised, whose entry "model" names the model that they belong to. load: `veneer.<load>(model, folder)`
    puts them in place.
    make: `veneer.<make>(model, form)` changes a plain model so, or None where only a folder can hold the
    layers.
    whole: the folder holds a whole model; load is then `veneer.<load>(folder)`, which opens it.
    """

    name: str
    forms: Callable[[nn.Module], Mapping[str, str]]
    marker: str
    load: str
    make: str | None = None
    whole: bool = False


KINDS = (
    Kind("quantised", formats, "quantised.json", "load_quantised", "quantise"),
    Kind("factored", factored_forms, "factored.json", "load_compressed", whole=True),
)
Forms = dict[str, list[str]]  # kind -> forms, sorted; kinds that do not occur are left out


def forms_of(model: nn.Module) -> Forms:
    """Returns the forms of the model's changed layers by kind, as veneer.json keeps them; {} for a plain
    model."""
    found = {kind.name: sorted(set(kind.forms(model).values())) for kind in KINDS}
    return {name: forms for name, forms in found.items() if forms}


def recorded(base: Mapping[str, Any]) -> Forms:
    """Returns the forms that the entry "base" of a veneer.json holds."""
    return {kind.name: list(base[kind.name]) for kind in KINDS if base.get(kind.name)}


def in_words(forms: Forms) -> str:
    """Returns "quantised (nf4)", or "plain" for {}."""
    return " and ".join(f"{name} ({', '.join(each)})" for name, each in forms.items()) or "plain"


def advice(forms: Forms) -> str:
    """Returns the call that turns the plain base into one with these forms, or the way to open one from its
    folder."""
    ((name, each),) = forms.items() if len(forms) == 1 else (("", []),)
    kind = next((k for k in KINDS if k.name == name), None)
    if kind is not None and kind.make is not None and len(each) == 1:
        return f"veneer.{kind.make}(model, {each[0]!r}) first"
    return "open the base from the folder that the adapter was made on"


def kind_of_folder(folder: str | Path) -> Kind | None:
    """Returns the kind of changed layers that a folder holds, or None for any other name."""
    return next((kind for kind in KINDS if (Path(folder) / kind.marker).is_file()), None)


def origin(name: str) -> str:
    """Returns the model that a folder of changed layers belongs to, or the name itself for any other and for
    a whole model.

    Raises FormatError if the folder does not say so.
    """
    kind = kind_of_folder(name)
    if kind is None or kind.whole:
        return name
    path = Path(name) / kind.marker
    return str(files.read_json(path, ["model"])["model"])


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts the folder's changed layers in place of the model's own. Raises FormatError if it holds none."""
    kind = kind_of_folder(folder)
    if kind is None:
        known = ", ".join(k.marker for k in KINDS)
        raise FormatError(f"{folder}: changed layers are missing; expected one of {known}")
    found: nn.Module = _public(kind.load)(model, folder)
    return found


def open_whole(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """Returns the model of a folder that holds a whole one. Raises what reading it raises."""
    kind = kind_of_folder(folder)
    if kind is None or not kind.whole:
        raise FormatError(f"{folder}: a whole changed model is missing")
    found: nn.Module = _public(kind.load)(folder, dtype=dtype)
    return found


def _public(name: str) -> Any:
    return getattr(importlib.import_module("veneer"), name)
