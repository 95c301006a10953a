"""Every method and variant learns the demo's text with the built-in model at its rate there, and leaves
the base as it was."""

from __future__ import annotations

import pytest
import torch

import veneer
from veneer import methods
from veneer.adapt.attached import base_parameters
from veneer.compress.quantise import quantise
from veneer.models import pretrained
from veneer.optim.base.groups import adamw, of_adapter, set_rates
from veneer.runs.texts import sources
from veneer.train import rates

ROWS, LENGTH, STEPS = 2, 48, 5
LAST = r"model\.layers\.3(\..*)?"  # the baseline that trains the last layers alone
# What is trained -> the method, its options and layers.
VARIANTS = {
    **{name: (name, {}) for name in methods.available()},
    "rslora": ("lora", {"stabilised": True}),
    "pissa": ("lora", {"init": "pissa"}),
    "olora": ("lora", {"init": "olora"}),
    "orthogonal": ("lora", {"init": "orthogonal"}),
    "miss mini": ("miss", {"rank": 16, "mini": 64}),
    "fourierft grid": ("fourierft", {"grid": True}),
    "loldu svd": ("loldu", {"basis": "svd"}),
    "flora of rank 3": ("flora", {"rank": 3}),
    "bottleneck pfeiffer": ("bottleneck", {"placement": "pfeiffer"}),
    "bottleneck parallel": ("bottleneck", {"placement": "parallel"}),
    "last layers": ("full", {"to": LAST}),
}
RATES = {"loldu svd": 0.128, "adalora": 0.05}  # other than the method's own
VARIANTS["bat"] = ("bat", {"rank": 16})  # its ranks must divide the layers
VARIANTS["bitfit"] = ("bitfit", {"to": "all-linear"})  # the model has no biases of its own


@pytest.fixture(scope="module")
def ids():
    """The beginning of the demo's prose."""
    text = "".join(row.columns["text"] for row in sources.rows(["builtin:prose"], "train")[:3])
    return torch.tensor(pretrained.tokenizer("builtin")(text)["input_ids"][: ROWS * LENGTH]).view(
        ROWS, LENGTH
    )


@pytest.fixture(scope="module")
def model():
    return pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))


def losses(model, ids, rate):
    """Of every step of training on the same rows again and again, at the recipe's optimiser."""
    adam, found = adamw(of_adapter(model, "default"), {}), []
    set_rates(adam, rate=rate, decay=0.0)
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_the_demos_text_and_leaves_the_base_as_it_was(variant, model, ids):
    method, options = VARIANTS[variant]
    before = {n: p.detach().clone() for n, p in base_parameters(model).items()}
    veneer.attach(model, method, **options)
    try:
        found = losses(model, ids, RATES.get(variant, rates.default(method, "adamw", True)))
    finally:
        veneer.detach(model)
    assert found[-1] < found[0] - 0.02, found
    assert all(torch.equal(p, before[n]) for n, p in base_parameters(model).items())


def test_an_adapter_of_a_base_in_four_bits_learns_it(ids):
    model = quantise(pretrained.causal_lm("builtin", torch.float32, torch.device("cpu")), "nf4")
    found = losses(veneer.attach(model, "lora"), ids, rates.default("lora", "adamw", True))
    assert found[-1] < found[0] - 0.02, found
