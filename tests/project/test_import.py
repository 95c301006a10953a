"""`import veneer` is quick and imports torch and safetensors only."""

from __future__ import annotations

import json

from support.fresh import printed

import veneer

COST = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import veneer
seconds = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps({"seconds": seconds, "packages": sorted(new)}))
"""


def test_import_brings_nothing_but_torch_and_safetensors_and_is_quick():
    found = json.loads(printed(COST))
    assert set(found["packages"]) <= {"veneer", "safetensors"}
    assert found["seconds"] < 0.3  # the processor's time: what else the machine does only adds waiting


def test_every_public_name_is_there():
    assert all(getattr(veneer, name) is not None for name in veneer.__all__)
