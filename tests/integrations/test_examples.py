"""Every example of a training runs to its end, is short, and leaves a folder that holds an adapter."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SERVING = {"ray_serve"}  # see tests/serve/test_ray.py


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e.stem not in SERVING], ids=lambda path: path.stem
)
def test_an_example_runs_and_saves_an_adapter(example, tmp_path, monkeypatch):
    for package in ("trl", "diffusers"):
        if package in example.read_text():
            pytest.importorskip(package)
    assert len(example.read_text().splitlines()) <= 40
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("OUT", str(tmp_path))
    found = runpy.run_path(str(example))
    assert list(tmp_path.rglob("adapter_model.safetensors"))
    assert not list(tmp_path.rglob("model.safetensors"))
    if "painted" in found:  # diffusers' own layers, after those of Veneer
        assert (found["ours"] - found["plain"]).abs().max() > 1e-3
        assert (found["painted"]() - found["ours"]).abs().max() <= 1e-5
