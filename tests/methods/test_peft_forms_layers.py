"""Layers that each method writes in PEFT's layout, and the one method that reads a kind of PEFT's file."""

from __future__ import annotations

import pytest
from support.cells import built
from support.peft_forms import FORMS, IN, OUT
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer import methods
from veneer.methods import PeftKind
from veneer.sites import site_for

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(8, 8),
    "transposed": Conv1D(8, 8),
    "embedding": nn.Embedding(8, 8),
    "conv1d": nn.Conv1d(8, 8, 3),
    "conv2d": nn.Conv2d(8, 8, 3, padding=1),
    "conv3d": nn.Conv3d(8, 8, 3),
    "grouped": nn.Conv2d(8, 8, 3, groups=2),
    "dilated": nn.Conv2d(8, 8, 3, dilation=2),
    "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "same": nn.Conv2d(8, 8, 3, padding="same"),
    "long kernel": nn.Conv2d(8, 8, (3, 1)),
    "long stride": nn.Conv2d(8, 8, 3, stride=(2, 1)),
    "long padding": nn.Conv2d(8, 8, 3, padding=(1, 0)),
}
ROWS = {"linear", "transposed"}
SAME = {*LAYERS} - {"grouped", "dilated", "circular"}
DENSE = {*LAYERS} - {"transposed", "embedding", "conv3d", "circular"}
STORED: dict[str, set[str]] = {
    "adalora": ROWS,
    "bat": {"linear"},
    "boft": {"linear"},
    "dora": SAME,
    "fourierft": ROWS,
    "hira": {*ROWS, "embedding"},
    "hra": {"linear", "conv2d"},
    "ia3": ROWS,
    "loha": DENSE,
    "lokr": DENSE,
    "lora": SAME,
    "lorafa": SAME,
    "miss": {"linear"},
    "oft": {"linear", "embedding"},
    "randlora": ROWS,
    "shira": {"linear"},
    "vera": ROWS,
}
SMALL = {
    **{n: {"rank": 2} for n in STORED},
    "adalora": {"rank": 2, "target": 1},
    "boft": {"block": 4},
    "ia3": {},
    "oft": {"block": 4},
    "fourierft": {"frequencies": 5},
    "lokr": {"rank": 1, "factor": 1},
}


@pytest.mark.parametrize("method", STORED)
def test_layers_that_peft_computes_otherwise_stay_in_our_own_file(method):
    found = {
        n
        for n, layer in LAYERS.items()
        if built(method, layer, SMALL[method])[1].to_peft(site_for("", layer))
    }
    assert found == STORED[method]


def test_every_method_that_peft_stores_is_in_the_tables():
    stored = {n for n in methods.available() if issubclass(methods.get(n), methods.PeftStored)}
    assert stored == {*STORED} == {form.method for form in FORMS.values()}


def test_a_change_that_peft_cannot_draw_again_stays_in_our_own_file():
    """Numbers that no rank gives; a grid; frequencies of another draw."""
    for numbers in (OUT, IN, 2 * IN, OUT + IN + 1):
        site, delta = built("shira", nn.Linear(IN, OUT), {"numbers": numbers})
        assert delta.to_peft(site) is None
    site, delta = built("fourierft", nn.Linear(IN, OUT), {"frequencies": 6, "grid": True})
    assert delta.to_peft(site) is None
    site, delta = built("fourierft", nn.Linear(IN, OUT), {"frequencies": 4})
    assert delta.to_peft(site) is not None
    delta.columns.copy_((delta.columns + 1) % IN)
    assert delta.to_peft(site) is None
    layer = nn.Embedding(IN, OUT)
    layer.embed_scale = 2.0
    site, delta = built("hira", layer, {"rank": 2})
    assert delta.to_peft(site) is None


READERS = {
    ("ADALORA", None): {"adalora"},
    ("BOFT", None): {"boft"},
    ("CARTRIDGE", None): {"prefix"},
    ("FOURIERFT", None): {"fourierft"},
    ("HIRA", None): {"hira"},
    ("HRA", None): {"hra"},
    ("IA3", None): {"ia3"},
    ("LOHA", None): {"loha"},
    ("LOKR", None): {"lokr"},
    ("LORA", None): {"lora"},
    ("LORA", ("use_dora", False)): {"lora"},
    ("LORA", ("use_dora", True)): {"dora"},
    ("MISS", None): {"miss"},
    ("MISS", ("init_weights", "mini")): {"miss"},
    ("MISS", ("init_weights", "bat")): {"bat"},
    ("OFT", None): {"oft"},
    ("PREFIX_TUNING", None): {"prefix"},
    ("RANDLORA", None): {"randlora"},
    ("SHIRA", None): {"shira"},
    ("VERA", None): {"vera"},
    ("ROAD", None): set(),
    ("ROAD", ("use_dora", True)): set(),
    ("ROAD", ("init_weights", "bat")): set(),
}


@pytest.mark.parametrize(("kind", "more"), READERS)
def test_a_file_has_one_reader(kind, more):
    config = {"peft_type": kind, **({more[0]: more[1]} if more else {})}
    known = {n: methods.get(n) for n in methods.available()}
    found = {n for n, m in known.items() if issubclass(m, PeftKind) and m.reads_peft(config)}
    assert found == READERS[kind, more]
