"""A bank that computes base and adapters in one kernel gives the numbers of the bank without it."""

from __future__ import annotations

import logging

import pytest
import torch
from support.interpreted import interpreted
from support.models import llama, randomise

import veneer
from veneer.adapt.banks import entries
from veneer.adapt.banks.one_pass import one_pass_bank
from veneer.adapt.banks.segments import SegmentBank
from veneer.errors import ConfigError
from veneer.ops.fused import product, trial
from veneer.serve import kernels

pytest.importorskip("triton")
ADAPTERS = {
    "a": ("lora", {"rank": 2}),
    "wide": ("lora", {"rank": 5, "to": ["q_proj", "up_proj", "lm_head"]}),
    "dora": ("dora", {"rank": 3}),
    "ia3": ("ia3", {}),
}
PLAIN = [({"a": 1.0}, 3), ({"a": -0.5}, 20), ({}, 2), ({"wide": 1.0}, 4)]
BATCHES = {
    "plain": PLAIN,
    "sums and gains": [({"a": 1.0, "wide": 0.5}, 3), ({"dora": 1.0}, 4), ({"ia3": 1.0}, 2)],
    "gains of inputs alone": [({"ia3": 1.0}, 5)],
    "the base alone": [({}, 6)],
    "too many rows": [({"a": 1.0}, 40)],
}


def adapted():
    model = llama(tie_word_embeddings=False)
    for seed, (name, (method, options)) in enumerate(ADAPTERS.items()):
        veneer.attach(model, method, name=name, **options)
        randomise(model, name, seed=seed, size=0.2)
    forms = {n: e.forms for n, e in entries.entries(model, {name: name for name in ADAPTERS}).items()}
    veneer.detach(model)
    return model, forms


def logits(bank, forms, batch):
    placed = {name: bank.put(form)[0] for name, form in forms.items()}
    rows = [(tuple((placed[n], s) for n, s in terms.items()), n) for terms, n in batch]
    bank.use(rows)
    total = sum(n for _, n in batch)
    ids = torch.randint(0, 97, (1, total), generator=torch.Generator().manual_seed(total))
    with torch.inference_mode():
        return bank.model(input_ids=ids).logits


@pytest.mark.parametrize("name", BATCHES)
def test_batches_with_and_without_the_kernel_are_alike(name, monkeypatch):
    calls = []
    run = product.product
    monkeypatch.setattr(product, "product", lambda *given: calls.append(1) or run(*given))
    model, forms = adapted()
    right = logits(SegmentBank(model), forms, BATCHES[name])
    model, forms = adapted()
    bank = one_pass_bank(model, (1, 32))
    with interpreted():
        found = logits(bank, forms, BATCHES[name])
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(calls) == (15 if name == "plain" else 0)  # all layers of the model
    bank.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_hook_of_others_sees_all_rows():
    model, forms = adapted()
    right = logits(SegmentBank(model), forms, PLAIN)
    model, forms = adapted()
    seen = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda module, args, y: seen.append(y.shape[1]))
    with interpreted():
        torch.testing.assert_close(logits(one_pass_bank(model, (1, 99)), forms, PLAIN), right)
    assert set(seen) == {29}


def test_a_trial_measures_and_chooses():
    with interpreted():
        found = trial.trial(torch.randn(48, 32), 4, sizes=(1, 20), repeats=1)
    assert [t.rows for t in found] == [1, 20] and all(t.kernel > 0 and t.steps > 0 for t in found)
    assert all(0 < t.off < 1e-6 for t in found) and trial.won(found) is None  # an interpreter wins nothing
    times = [trial.Timed(n, k, 1.0, 0.0) for n, k in ((1, 2.0), (4, 0.9), (16, 1.0), (64, 0.5), (256, 0.94))]
    assert trial.won(times) == (64, 256) and trial.won(times[:3]) == (4, 4)


@pytest.mark.parametrize(
    ("seconds", "off", "used"), [(0.5, 1e-7, True), (0.96, 1e-7, False), (0.5, 1e-4, False), (None, 0, False)]
)
def test_a_server_takes_the_kernel_only_where_it_won(seconds, off, used, monkeypatch, caplog):
    def measured(W, rank):
        if seconds is None:
            raise RuntimeError("no such instruction")
        return [trial.Timed(n, seconds, 1.0, off) for n in (4, 16)]

    monkeypatch.setattr(trial, "trial", measured)
    model = adapted()[0]
    with caplog.at_level(logging.INFO, "veneer.serve"):
        bank = kernels.chosen(model, kernels._typical(model))
    assert (bank.layer is not SegmentBank(model).layer) == used
    said = "used for 4 to 16 rows an adapter" if used else "not used"
    assert said in caplog.text


def test_a_server_without_a_gpu_refuses_the_kernel():
    with pytest.raises(
        ConfigError, match=r"one_pass needs a GPU.*no linear layer on a GPU; leave one_pass out"
    ):
        kernels.bank(adapted()[0])
