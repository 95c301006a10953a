"""CUDA graphs: refused without a GPU, and gradients that no graph's memory holds.

What needs a GPU is skipped without one.
"""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, llama, randomise
from support.tiny import settings

import veneer
from veneer.errors import ConfigError
from veneer.runs.fit import fit
from veneer.tasks.text import next_token
from veneer.train.run import Run
from veneer.train.speed.compiling import prepare, restore
from veneer.train.speed.graphs import on_graphs


def batches(device="cpu", n=2):
    draw = torch.Generator().manual_seed(0)
    made = (
        {k: torch.randint(0, VOCABULARY, (2, 12), generator=draw).to(device) for k in ("input_ids", "labels")}
        for _ in range(n)
    )
    return list(made)


def accumulated(model, objective, given):
    model.zero_grad()
    for batch in given:
        objective(model, batch)[0].backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def adapted(device="cpu"):
    model = veneer.attach(llama(), "lora", rank=2).to(device).train()
    randomise(model)
    return model


def test_without_a_gpu_they_are_refused(tmp_path):
    run = Run.from_dict({**settings(tmp_path), "out": str(tmp_path / "run"), "compile": "graphs"})
    with pytest.raises(
        ConfigError, match="compile='graphs' needs a GPU, and this run computes on cpu; use compile='on'"
    ):
        fit(run, progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ConfigError, match="compile must be 'off' or 'auto' for runs trained together, got 'graphs'"
    ):
        veneer.fit_many([run], progress=False)


def test_gradients_are_added_into_tensors_that_were_there_before():
    model, given, places = adapted(), batches(), []
    expected = accumulated(model, next_token.loss, given)

    def objective(model, batch, smoothing):
        places.append({n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad})
        return next_token.loss(model, batch, smoothing=smoothing)

    found = accumulated(model, on_graphs(objective), given)
    assert (
        places[0]
        == places[1]
        == {n: p.grad.data_ptr() for n, p in model.named_parameters() if p.requires_grad}
    )
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g)
    model.zero_grad()
    with torch.no_grad():
        on_graphs(next_token.loss)(model, given[0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_steps_on_graphs_are_the_plain_ones():
    model, given = adapted("cuda"), batches("cuda")
    expected = accumulated(model, next_token.loss, given)
    objective = prepare(model, given[0], compiled=True, with_graphs=True)
    for _ in range(4):  # the first runs warm up and record
        found = accumulated(model, objective, given)
    restore(model)
    for name, g in expected.items():
        assert float((found[name] - g).norm() / g.norm()) <= 1e-4, name
