"""A graph that was compiled at one processor capability is never used at another."""

from __future__ import annotations

import json
import os
import sys
from subprocess import run

import pytest
import torch
from support import models, tally
from support.fresh import SOURCE
from support.objectives import causal_lm

from veneer.train.speed import compiling, graph_key

PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
from veneer.train.speed import graph_key
if sys.argv[1] == "keyed":
    graph_key.use()
def f(x, w):
    return torch.softmax((x @ w).relu() * 2 - 1, -1).sum(0)
torch.manual_seed(0)
x, w = torch.randn(64, 70), torch.randn(70, 50)
with torch.no_grad():
    error = (torch.compile(f)(x, w) - f(x, w)).abs().max().item()
print(json.dumps([graph_key.tag(), error, counters["inductor"].get("fxgraph_cache_hit", 0)]))
"""
HERE = torch.backends.cpu.get_cpu_capability()


def compiled(folder: os.PathLike[str], capability: str | None, how: str = "keyed") -> tuple[str, float, int]:
    """Returns key, error and hits of a small graph that a new process compiles or finds in the folder."""
    own = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(SOURCE), **own}
    done = run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    key, error, hits = json.loads(done.stdout)
    return key, error, hits


@pytest.mark.skipif(not tally.FULL, reason="compiles in three processes: make test-faults")
@pytest.mark.skipif(HERE != "AVX512", reason="needs a processor with two capabilities")
@pytest.mark.skipif(compiling.missing(torch.device("cpu")) is not None, reason="needs a compiler")
def test_a_graph_of_another_capability_is_not_used(tmp_path):
    here, error, hits = compiled(tmp_path, None)
    assert error < 1e-5 and hits == 0
    other, error, hits = compiled(tmp_path, "avx2")
    assert other != here and error < 1e-5 and hits == 0
    again, error, hits = compiled(tmp_path, "avx2")
    assert again == other and error < 1e-5 and hits == 1


def test_the_key_names_capability_features_limits_and_versions(monkeypatch):
    key = graph_key.tag()
    assert key.startswith(f"veneer-{HERE}-") and key == graph_key.tag()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert graph_key.tag().startswith("veneer-AVX2-")
    for owner, name, value in (
        (graph_key, "_features", lambda: [("amx_tile", True)]),
        (graph_key, "__version__", "0"),
        (torch, "__version__", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert graph_key.tag() != key
    for name in graph_key.LIMITS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "other")
            assert graph_key.tag() != key


def test_a_key_of_the_users_own_stays():
    from torch.compiler import config

    with config.patch(cache_key_tag="mine"):
        graph_key.use()
        graph_key.use()
        assert config.cache_key_tag == f"mine {graph_key.tag()}"


def test_a_compiled_training_uses_the_key():
    from torch.compiler import config

    ids = torch.randint(1, 60, (2, 8))
    with config.patch(cache_key_tag=""):
        compiling.prepare(models.llama(), causal_lm(), {"input_ids": ids, "labels": ids}, compiled=True)
        assert config.cache_key_tag == graph_key.tag()
