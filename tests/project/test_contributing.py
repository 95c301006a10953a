"""The method that CONTRIBUTING.md adds, tested for the same properties as the others."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import oracles
import pytest
import test_methods
from support import table
from test_layers import ROWS as LAYERS
from torch import nn

import veneer
from veneer import methods

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^`([\w/.]+)`\n\n```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))
METHOD, ORACLE, ROWS = "src/veneer/methods/rescale.py", "tests/oracles/rescale.py", "tests/support/table.py"
NAMES = re.findall(r'^ +"([\w ]+)": Method', BLOCKS[ROWS], re.MULTILINE)
PROPERTIES = {
    name: f
    for name, f in vars(test_methods).items()
    if any(
        mark.name == "parametrize" and mark.args[1] is test_methods.CELLS
        for mark in getattr(f, "pytestmark", ())
    )
}


@pytest.fixture(scope="module", autouse=True)
def added(tmp_path_factory):
    """The method's file, its oracle and its rows in place for the tests of this file."""
    modules = ("veneer.methods.rescale", "oracles.rescale")
    with pytest.MonkeyPatch.context() as patch:
        for package, block in ((methods, METHOD), (oracles, ORACLE)):
            folder = tmp_path_factory.mktemp(package.__name__)
            (folder / Path(block).name).write_text(BLOCKS[block], encoding="utf-8")
            patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        importlib.invalidate_caches()
        rows = eval(
            f"{{{BLOCKS[ROWS]}}}",
            {"Method": table.Method, "rescale": importlib.import_module("oracles.rescale")},
        )
        for name, row in rows.items():
            patch.setitem(table.METHODS, name, row)
        yield
        for name in modules:
            package, _, child = name.rpartition(".")
            sys.modules.pop(name, None)
            vars(sys.modules[package]).pop(child, None)


def test_the_text_names_all_three_parts():
    assert list(BLOCKS) == [METHOD, ORACLE, ROWS] and NAMES == ["rescale", "rescale outputs"]
    assert len(PROPERTIES) >= 8


@pytest.mark.parametrize("site", table.SITES)
@pytest.mark.parametrize("prop", PROPERTIES)
@pytest.mark.parametrize("name", NAMES)
def test_has_every_property(name, prop, site):
    PROPERTIES[prop](name, site)


def test_the_table_of_rows_is_that_of_the_layers():
    table = TEXT.split("| row | contents |")[1].split("\n\n")[0]
    written = [tuple(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    assert [frozenset(row) for row in written[::-1]] == [frozenset(row) for row in LAYERS[:-1]]


def test_is_known_everywhere(capsys):
    from veneer.cli.frame import main

    assert "rescale" in methods.available()
    assert main(["methods"]) == 0
    assert "rescale: Rescale: W' = (I + diag u) W (I + diag v)" in (shown := capsys.readouterr().out)
    assert "--inputs: scale the inputs too, not the outputs alone [yes]" in shown
    model = veneer.attach(nn.Sequential(nn.Linear(3, 2)), "rescale", inputs=False)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.deltas.default.u"]
