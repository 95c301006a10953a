"""Banks: which settings and adapters they take, what is refused together, and the room that is made."""

from __future__ import annotations

import pytest
import torch
from support.gains import Gains
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt.attached import layers
from veneer.errors import ConfigError, ShapeError, SiteError

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(**methods):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).double()
    for i, (name, (method, options)) in enumerate(methods.items()):
        veneer.attach(model, method, name=name, **options)
        randomise(model, name, seed=i, size=0.3)
    return model


LOW = ("lora", {"rank": 2})


@pytest.mark.parametrize(
    "given", [{"slots": 1}, {"rank": 1}, {"gains": True}, {"products": 1}, {"to": ["0"]}]
)
def test_room_and_training_exclude_each_other(given):
    with pytest.raises(ConfigError, match="cannot be set with trainable=True"):
        veneer.bank(adapted(a=LOW), ["a"], trainable=True, **given)


@pytest.mark.parametrize("name", ["base", ""])
def test_names_of_the_base_and_of_free_slots_are_refused(name):
    with pytest.raises(ConfigError, match="cannot name adapters of a bank"):
        veneer.bank(adapted(a=LOW), {name: "a"})


def test_a_model_has_one_bank():
    model = adapted(a=LOW, b=LOW)
    rows = veneer.bank(model, ["a"])
    assert veneer.bank(model).layers == rows.layers
    with pytest.raises(ConfigError, match="this model has a bank already"):
        veneer.bank(model, ["b"], name="other")
    with pytest.raises(ConfigError, match="this model has no bank"):
        veneer.bank(adapted(a=LOW))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"slots": 1}, "slots: must be at least 2, the number of adapters, got 1"),
        ({"slots": 0}, "slots: must be at least 2, the number of adapters, got 0"),
    ],
)
def test_fewer_slots_than_adapters_are_refused(given, text):
    with pytest.raises(ConfigError, match=text):
        veneer.bank(adapted(a=LOW, b=LOW), ["a", "b"], **given)


@pytest.mark.parametrize("given", [{}, {"slots": 2}, {"to": ["0"], "rank": 2}])
def test_a_bank_without_adapters_needs_slots_and_layers(given):
    with pytest.raises(ConfigError, match="this bank would be empty"):
        veneer.bank(adapted(), {}, **given)


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_there_are_as_many_slots_as_asked_for(slots):
    model = adapted(a=LOW, b=LOW, c=LOW)
    rows = veneer.bank(model, ["a", "b"], slots=slots)
    assert rows.names == {"base": 0, "a": 1, "b": 2}
    for i in range(slots - 2):
        assert rows.write(f"more {i}", "c") == 3 + i
    with pytest.raises(ConfigError, match=f"all {slots} slots of the bank are taken; evict one of a, b"):
        rows.write("last", "c")


KINDS = {
    "rank": ("lora", {"rank": 3}),
    "gains": ("dora", {"rank": 2}),
    "products": ("flora", {"rank": 2}),
    "none": ("ia3", {"to": ["1"]}),
    "all": (Gains, {"to": ["0", "1"]}),
}


@pytest.mark.parametrize(
    ("room", "fits"),
    [
        ({}, ()),
        ({"rank": 2}, ()),
        ({"rank": 3}, ("rank",)),
        ({"gains": True}, ("none",)),
        ({"rank": 2, "gains": True}, ("gains", "none", "all")),
        ({"products": 1}, ("none",)),
        ({"products": 2}, ("products", "none")),
        ({"rank": 3, "products": 2}, ("rank", "gains", "products", "none", "all")),
    ],
)
def test_room_is_made_for_what_was_asked(room, fits):
    """Products come with gains of outputs; without any setting there is room for nothing."""
    for kind, method in KINDS.items():
        model = adapted(a=method)
        rows = veneer.bank(model, {}, slots=1, to=["0", "1"], **room)
        if kind in fits:
            veneer.activate(model, "a")
            with torch.no_grad():
                wanted = model(X)
            veneer.activate(model, "bank")
            rows.write("a")
            rows.use("a")
            with torch.no_grad():
                torch.testing.assert_close(model(X), wanted, rtol=1e-9, atol=1e-9)
        else:
            with pytest.raises(ShapeError, match="the bank has no room for what 'a' has at"):
                rows.write("a")


def test_slots_are_as_large_as_the_largest_adapter_needs():
    model = adapted(a=LOW, b=KINDS["rank"])
    (layer, _) = veneer.bank(model, ["a", "b"]).layers.values()
    assert layer.A.shape == (3, 3, 6) and layer.input_gains(torch.float64) is None
    model = adapted(a=KINDS["products"], b=("flora", {"rank": 3}))
    (layer, _) = veneer.bank(model, ["a", "b"]).layers.values()
    assert layer.stacks(torch.float64).a.shape == (3, 3, 6)


@pytest.mark.parametrize("name", ["a", "base", "no name"])
def test_a_bank_s_own_name_must_be_free(name):
    with pytest.raises(ConfigError, match="adapter"):
        veneer.bank(adapted(a=LOW), ["a"], name=name)


def test_compiled_models_and_layers_held_whole_are_refused():
    with pytest.raises(ConfigError, match=r"must not be torch\.compile's wrapper"):
        veneer.bank(torch.compile(adapted(a=LOW), backend="eager"), ["a"])
    with pytest.raises(SiteError, match="another adapter holds 0 as a site of another kind"):
        veneer.bank(adapted(whole=("full", {"to": ["0"]})), {}, slots=1, rank=1, to=["0"])


def test_the_first_step_of_a_bank_is_checked():
    model = adapted(a=LOW)
    model(X).sum().backward()
    model(X)
    assert not model._forward_hooks
    veneer.bank(model, ["a"], trainable=True).use("a")
    assert len(model._forward_hooks) == 1


def test_all_that_cannot_train_side_by_side_are_listed():
    model = adapted(
        a=LOW, drops=("lora", {"rank": 2, "dropout": 0.25}), odd=("bottleneck", {"to": ["0", "1"]})
    )
    (_, second) = (d["a"] for d in layers(model))
    second.dropout = 0.5
    with pytest.raises(ConfigError) as e:
        veneer.bank(model, ["a", "drops", "odd"], trainable=True)
    lines = str(e.value).split("\n")
    assert len(lines) == 3 and "'odd': bottleneck has no normal form at 0, 1" in lines[0]
    assert "'a' drops inputs (dropout=0.5)" in lines[1] and "'drops' drops inputs (dropout=0.25)" in lines[2]
    with pytest.raises(ConfigError) as e:
        veneer.bank(model, {"x": "aa", "y": "nothing", "z": "a"}, trainable=True)
    lines = str(e.value).split("\n")
    assert [line.partition(";")[0] for line in lines] == ["'x' is not attached", "'y' is not attached"]
    assert "did you mean 'a'" in lines[0]
    assert veneer.adapters(model) == ["a", "drops", "odd"]


def test_all_that_cannot_be_served_are_listed():
    low, odd = ("lora", {"rank": 2, "to": ["0"]}), ("bottleneck", {"to": ["0"]})
    model = adapted(a=low, odd=odd, whole=("full", {"to": ["1"]}))
    with pytest.raises(ConfigError) as e:
        veneer.bank(model, {"x": "nowhere", "y": "/no/folder"})
    assert str(e.value).count("is neither an attached adapter nor a folder") == 2
    for names in (["odd"], ["whole"], ["a", "odd", "whole"]):
        with pytest.raises(ConfigError) as e:
            veneer.bank(model, names)
        text = str(e.value)
        assert ("'odd': bottleneck has no normal form at 0;" in text) == ("odd" in names)
        assert ("'whole' changes 1 of kind 'leaf'; a bank serves linear layers: leave" in text) == (
            "whole" in names
        )
    assert veneer.active(model) and "bank" not in veneer.adapters(model)


def test_adapters_that_train_act_alone_and_learn_alone():
    model = adapted(a=LOW, b=LOW, c=LOW)
    veneer.bank(model, ["a", "b"], trainable=True).use(["a", "b"])
    assert veneer.active(model) == {"bank": 1.0}
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"a", "b"} and len(model._forward_hooks) == 1
    with pytest.raises(ConfigError, match="this bank would be empty; name the attached adapters to train"):
        veneer.bank(adapted(a=LOW), {}, trainable=True)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_keep_their_mode(training):
    model = adapted(a=LOW, b=("dora", {"rank": 2})).train(training)
    veneer.bank(model, ["a", "b"])
    assert all(d[n].training is training for d in layers(model) for n in ("a", "b"))
