"""`veneer fit --trp`: a run ends in a network of low rank, whichever way it got there."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny

import veneer
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.runs.fit import fit
from veneer.sites import find
from veneer.sites.factored.layers import Factored
from veneer.train.run import Run

INPUTS = {"input_ids": torch.arange(12)[None]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trp")


def settings(place: Path, out: str, **changed: Any) -> dict[str, Any]:
    own = tiny.settings(place, method="full", out=str(place / out), trp=0.6, trp_every=3, report=False)
    own.pop("options", None)
    return {**own, "precision": "fp32", **changed}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of a training that nothing interrupted."""
    fit(Run.from_dict(settings(place, "whole")), progress=False)
    return place / "whole"


def test_the_factored_model_is_the_base_with_the_adapter(whole: Path, place: Path):
    small = veneer.load_compressed(whole / "compressed")
    layers = [m for m in small.modules() if isinstance(m, Factored)]
    base = pretrained.causal_lm(str(place / "base"), torch.float32, torch.device("cpu"))
    numbers = sum(s.out * s.in_ for s in find(base))
    held = sum(sum(p.numel() for p in s.module.parameters()) for s in find(small))
    assert layers and held <= 0.6 * numbers
    before = base(**INPUTS).logits
    veneer.load(base, whole / "adapter")
    after = base(**INPUTS).logits
    torch.testing.assert_close(small(**INPUTS).logits, after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_a_stopped_run_goes_on_between_projections(whole: Path, place: Path):
    given = settings(place, "half")
    assert tiny.train(given, signal_at=(5, signal.SIGTERM)) == 143
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    names = sorted(p.relative_to(whole) for p in whole.glob("*/*.safetensors"))
    assert [n.parts[0] for n in names] == ["adapter", "compressed"]
    assert all((place / "half" / n).read_bytes() == (whole / n).read_bytes() for n in names)
    shutil.rmtree(place / "half")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"method": "lora"},
            "trp=0.6 projects the weights that method='full' trains; add it, or leave trp out",
        ),
        ({"trp": 0.0}, "trp must be above 0 and at most 1, got 0"),
        ({"trp": 1.5}, "trp must be above 0 and at most 1, got 1.5"),
        ({"trp_every": 0}, "trp_every must be 1 or more, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        Run.from_dict({"data": ["x.txt"], "method": "full", "trp": 0.6, "out": str(tmp_path), **changed})
    assert told in str(error.value)
