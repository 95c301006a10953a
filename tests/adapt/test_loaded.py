"""Reading an adapter leaves the model alone; banks check an adapter where they will serve it.
they serve.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import llama, randomise

import veneer
from veneer.adapt import attached, probe
from veneer.adapt.store import fingerprint
from veneer.errors import ConfigError, FormatError

TENSORS = "adapter_model.safetensors"
IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture
def folder(tmp_path):
    """An adapter in a folder, and its logits on IDS."""
    model = veneer.attach(llama(), "dora", rank=2, to=["q_proj", "down_proj"])
    randomise(model)
    return veneer.save(model, tmp_path / "a"), model(input_ids=IDS).logits.detach()


@pytest.fixture
def wrong(folder, tmp_path):
    """The same adapter whose kept outputs are those of another one."""
    path = folder[0] / "veneer.json"
    record = json.loads(path.read_text())
    record["probe"]["on"] = [v + 1 for v in record["probe"]["on"]]
    path.write_text(json.dumps(record))
    return folder[0]


def trace(model):
    """Everything that reading must not change."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    return [n for n, _ in model.named_modules()], hooks, grads, veneer.active(model)


def forbid(model):
    """Makes any call of the model fail."""

    def fail(*args: object) -> None:
        raise AssertionError("the model was called")

    return model.register_forward_pre_hook(fail)


def test_reading_neither_touches_nor_calls_the_model(folder):
    model = veneer.attach(llama(), "lora", rank=2, name="acting")
    before, state = trace(model), copy.deepcopy(model.state_dict())
    guard = forbid(model)
    found = veneer.read(model, folder[0])
    guard.remove()
    assert trace(model) == before
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [site.name for site, _ in found.changes] == [
        f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.q_proj", "mlp.down_proj")
    ]


@pytest.mark.parametrize("how", ["load", "attach"])
def test_what_was_read_is_attached_as_if_it_were_loaded(folder, how):
    model = llama()
    found = veneer.read(model, folder[0])
    if how == "load":
        veneer.load(model, found, "french")
    else:
        veneer.attach(model, found, name="french")
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), folder[1])
    assert veneer.active(model) == {"french": 1.0}
    trained = {".french." in n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == (
        {True} if how == "attach" else {False}
    )  # the base trains as before beside a loaded one


def test_a_failed_probe_leaves_the_model_as_it_was(wrong):
    model = llama()
    before = trace(model)
    found = veneer.read(model, wrong)
    with pytest.raises(FormatError, match="was not loaded:\n- probe: with the adapter on"):
        veneer.load(model, found)
    assert trace(model) == before


def test_what_was_read_belongs_to_one_model_and_hangs_once(folder):
    model = llama()
    found = veneer.read(model, folder[0])
    with pytest.raises(ConfigError, match="was read for another model"):
        veneer.load(llama(), found)
    veneer.load(model, found, "first")
    with pytest.raises(ConfigError, match="this copy is attached already"):
        veneer.load(model, found, "second")
    veneer.detach(model)
    veneer.load(model, found, "second")


def test_options_beside_what_was_read_are_refused(folder):
    model = llama()
    found = veneer.read(model, folder[0])
    with pytest.raises(ConfigError, match="pass only its name="):
        veneer.attach(model, found, rank=4)
    with pytest.raises(ConfigError, match=r"pass allow= and initial= to veneer\.read"):
        veneer.load(model, found, allow="probe")
    assert veneer.adapters(model) == []


def test_a_bank_checks_an_adapter_in_its_slot_and_is_never_off(folder, monkeypatch):
    model = llama()
    bank = veneer.bank(model, {"a": folder[0]}, slots=2)
    bank.use(["a", None])
    before, seen = bank.ids.clone(), []

    def note(module: object, args: object, output: object) -> None:
        seen.append((veneer.active(model), bank.ids.tolist()))

    handle = model.register_forward_hook(note)
    slot = bank.write("b", folder[0])
    handle.remove()
    assert seen == [({"bank": 1.0}, 0), ({"bank": 1.0}, slot)]
    assert torch.equal(bank.ids, before)
    bank.use("b")
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), folder[1])


def test_a_bank_takes_what_was_read(folder):
    model = llama()
    bank = veneer.bank(model, {"a": veneer.read(model, folder[0])}, slots=2)
    guard = forbid(model)
    found = veneer.read(model, folder[0])
    guard.remove()
    bank.write("b", found)
    bank.use(["a", "b"])
    torch.testing.assert_close(model(input_ids=IDS).logits.detach(), folder[1])


def test_an_adapter_that_fails_in_its_slot_is_not_served(folder, wrong):
    model = llama()
    veneer.attach(model, "lora", rank=2, name="own")
    randomise(model, "own")
    with pytest.raises(FormatError, match="- probe: with the adapter on"):
        veneer.bank(model, {"own": "own", "a": wrong})
    assert veneer.adapters(model) == ["own"] and veneer.active(model) == {"own": 1.0}
    bank = veneer.bank(model, ["own"], slots=2, rank=2, gains=True, to="all-linear")
    with pytest.raises(FormatError, match="- probe: with the adapter on"):
        bank.write("a", wrong)
    assert bank.names == {"base": 0, "own": 1}
    assert all(not layer.A[2].any() for layer in bank.layers.values())


def test_a_bank_that_does_not_act_is_checked_all_the_same(folder, wrong):
    model = llama()
    bank = veneer.bank(model, {}, slots=1, rank=2, gains=True, to="all-linear")
    with veneer.using(model), pytest.raises(FormatError, match="- probe: with the adapter on"):
        bank.write("a", wrong)


def test_the_fingerprint_is_computed_once_for_a_model(monkeypatch):
    model, counted = llama(), []
    monkeypatch.setattr(
        fingerprint, "_measured", lambda m, real=fingerprint._measured: counted.append(1) or real(m)
    )
    first = fingerprint.measure(model)
    first["tensors"].clear()  # what a caller does with its copy is nobody else's
    veneer.attach(model, "lora", rank=2)
    assert fingerprint.measure(model)["tensors"] and len(counted) == 1


@pytest.mark.parametrize("how", ["in place", "by .data", "replaced", "loaded", "cast"])
def test_a_base_that_was_written_to_is_measured_again(how):
    model = llama()
    first, weight = fingerprint.measure(model), model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        if how == "in place":
            weight[0, 0] += 1
        elif how == "by .data":
            weight.data.mul_(2)
        elif how == "replaced":
            model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight + 1)
        elif how == "loaded":
            model.load_state_dict(llama(seed=5).state_dict())
        else:
            model.half()
    assert fingerprint.measure(model) != first


def test_probes_of_other_outputs_are_seen_through_any_way(folder):
    model = veneer.load(llama(), folder[0], "a")
    saved = json.loads((folder[0] / "veneer.json").read_text())["probe"]
    assert probe.check(model, probe.through(model, "a"), saved) == []
    with torch.no_grad():
        attached.changes(model, "a")[0][1].lora.B.mul_(-1)
    assert probe.check(model, probe.through(model, "a"), saved) != []


def test_a_foreign_adapter_without_effect_is_seen_in_its_slot(tmp_path):
    model = veneer.attach(llama(), "lora", rank=2, to=["q_proj"])
    randomise(model)
    veneer.save(model, tmp_path)
    (tmp_path / "veneer.json").unlink()
    tensors = load_file(tmp_path / TENSORS)
    save_file({n: t * 1e-30 for n, t in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(FormatError, match="outputs with it are those of the base, bit for bit"):
        veneer.bank(llama(), {"a": tmp_path})
