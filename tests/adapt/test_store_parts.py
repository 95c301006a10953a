"""Parts of saving and loading, one by one: fingerprints, sizes, rounding, manifests, problems, our layout."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.adapt.peft import settings
from veneer.adapt.store import fingerprint, folder, manifest, native, problems, rounding, sizes, store
from veneer.adapt.store.sizes import Size
from veneer.errors import ConfigError, FormatError
from veneer.methods.base.biased import Biased
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.lora import LoRA
from veneer.sites import LeafSite, site_for

DRAW = torch.Generator().manual_seed(7)


def numbers(*shape):
    return torch.randn(*shape, generator=DRAW)


def net():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "first": nn.Linear(3, 4),
            "second": nn.Linear(4, 5),
            "embed": nn.Embedding(7, 5),
            "norm": nn.LayerNorm(4),
        }
    )


def lora(model, name, **options):
    site = site_for(name, model[name])
    A, B = numbers(2, site.in_), numbers(site.out, 2)
    return site, LoRA.holding(site, A, B, **{"alpha": 6.0, **options})


def other(model, name, method, **options):
    site = LeafSite(name, model[name]) if method == "full" else site_for(name, model[name])
    return site, methods.build(methods.get(method), site, options)


def rows(model, tokens):
    site = site_for("embed", model["embed"])
    return site, TokenRows(site, nn.Parameter(numbers(len(tokens), 5)), tokens)


# Fingerprints


def test_replaced_modules_leave_the_fingerprint():
    record = fingerprint.measure(net())
    left = fingerprint.without(record, ["norm", "first"])
    assert list(left["tensors"]) == ["second.weight", "second.bias", "embed.weight"]
    assert left["replaced"] == ["first", "norm"] and left["sha256"] != record["sha256"]
    assert fingerprint.without(record, []) is record


def test_differences_of_shape_are_no_differences_of_value():
    record, model = fingerprint.measure(net()), net()
    model["second"] = nn.Linear(4, 6)
    model["third"] = nn.Linear(1, 1, bias=False)
    del model["norm"]
    assert fingerprint.differences(model, record) == [
        "another base: weights have other shapes: second.weight (5, 4) -> (6, 4), second.bias (5,) -> (6,)",
        "another base: weights are not in this model: norm.weight, norm.bias",
        "another base: weights were not in the adapter's base: third.weight",
    ]


def record(dtype, *sample):
    return {"sha256": f"{dtype} {sample}", "dtype": dtype, "sample": list(sample)}


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (record("float16", 1.0, 2.0), record("bfloat16", 1.0, 3.0), False),  # each number counts
        (record("float16", 2.0**-14), record("float16", 2.0**-14 - 2.0**-23), True),  # the limit itself
        (record("float16", 2.0**-14), record("float16", 2.0**-14 - 2.0**-22), False),
        (record("float16", 1.0), record("int8", 2.0), False),
        (record("int8", 1.0), record("int8", 2.0), False),
        (record("float32", 1.0), record("bfloat16", 1.0 + 2.0**-20), False),
        (record("float32", 1.0), record("float32", 1.0), True),
    ],
)
def test_samples_are_alike_up_to_the_rounding_of_float16(a, b, same):
    assert fingerprint._same(a, b) == fingerprint._same(b, a) == same


def test_a_write_anywhere_is_seen():
    """The state that is kept with the fingerprint holds 32 numbers, and the version of a tensor."""
    model = nn.Linear(100, 90, bias=False)
    before = fingerprint.measure(model)
    assert fingerprint.measure(model) == before
    with torch.no_grad():
        model.weight.view(-1)[100 * fingerprint.SPREAD % 9000] += 1
    assert fingerprint.measure(model) != before


# Sizes and problems


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_sizes_of_a_change(scale):
    model = net()
    site, delta = lora(model, "second", alpha=6.0 * scale)
    D = 3 * scale * delta.B.detach().double() @ delta.A.detach().double()
    found = sizes.size(site, delta)
    assert found.change == pytest.approx(float(D.norm()), rel=1e-5)
    assert found.base == pytest.approx(float(site.weight().detach().norm()), rel=1e-5)
    A, B = delta.A.detach().double(), 3 * scale * delta.B.detach().double()
    assert found.floor == pytest.approx(2.0**-23 * float(A.norm()) * float(B.norm()), rel=1e-5)
    b = numbers(5)
    with_bias = sizes.size(site, Biased(site, delta, b))
    assert with_bias.change == pytest.approx(math.hypot(float(D.norm()), float(b.norm())), rel=1e-5)
    assert with_bias[1:] == found[1:]
    zero = sizes.size(site, Biased(site, lora(model, "second")[1], torch.zeros(5)))
    assert zero.base == found.base
    gained = other(model, "second", "dora", rank=2)
    with torch.no_grad():
        gained[1].lora.B.normal_()
    assert sizes.size(*gained).change == pytest.approx(
        float(gained[1].delta(gained[0]).detach().norm()), rel=1e-5
    )
    bottleneck = sizes.size(*other(model, "second", "bottleneck", rank=1))
    assert math.isnan(bottleneck.change) and not bottleneck.zero and bottleneck.floor == 0


def test_a_change_at_its_floor_is_zero():
    assert Size(1.0, 2.0, 1.0).zero and not Size(1.1, 2.0, 1.0).zero


def test_one_number_that_is_not_finite_is_enough():
    tensors = {"a": torch.tensor([1.0, torch.nan]), "b": torch.ones(2), "c": torch.tensor([torch.inf, 0])}
    assert sizes.finite(tensors) == ["a", "c"]
    assert problems.not_finite({"b": tensors["b"]}) == []
    ((kind, text),) = problems.not_finite(tensors)
    assert (kind, text) == ("finite", "NaN or infinity in 2 of 3 tensors: a, c")


def test_layers_that_learned_nothing():
    """A whole module may stay as it was, unless all did."""
    model = net()
    low, whole = lora(model, "first"), other(model, "norm", "full")
    change, zero = Size(1.0, 1.0, 0.0), Size(0.0, 1.0, 0.0)
    assert problems.dead([low, whole], {"first": change, "norm": zero}) == []
    ((kind, text),) = problems.dead([low, whole], {"first": zero, "norm": change})
    assert (
        kind == "zero" and text.startswith("the change is zero at 1 of 2 layers, which") and "first" in text
    )
    assert "at 1 of 1 layers" in problems.dead([whole], {"norm": zero})[0].text
    assert "at 1 of 2 layers" in problems.dead([low, whole], {"first": zero, "norm": zero})[0].text


@pytest.mark.parametrize(
    ("now", "then", "fits"),
    [
        (Size(101.0, 1.0, 0.0), 100.0, True),
        (Size(101.01, 1.0, 0.0), 100.0, False),
        (Size(98.99, 1.0, 0.0), 100.0, False),
        (Size(101.5, 1.0, 0.5), 100.0, True),
        (Size(101.6, 1.0, 0.5), 100.0, False),
        (Size(0.4, 1.0, 0.5), 0.0, True),
        (Size(math.nan, 1.0, 0.0), None, True),
        (Size(math.nan, 1.0, 0.0), 1.0, False),
    ],
)
def test_norms_may_move_by_a_hundredth_and_by_rounding(now, then, fits):
    found = problems.resized({"a": now}, {"a": {"norm": then}})
    assert (found == []) == fits and all(p.kind == "norm" for p in found)


def test_problems_that_are_let_through_and_those_that_are_not():
    given = [problems.Problem("zero", "z"), problems.Problem("norm", "n")]
    assert problems.refuse("it", given, {"zero", "norm", "base"}) == {"zero", "norm"}
    with pytest.raises(FormatError) as e:
        problems.refuse("it", given, {"norm"})
    assert str(e.value) == "it:\n- z\nto go on all the same: allow=('zero',)"
    with pytest.raises(FormatError) as e:
        problems.refuse("it", [*given, problems.Problem("fit", "f")])
    assert str(e.value) == "it:\n- z\n- n\n- f"
    every = [problems.Problem(word, word) for word in problems.ALLOW]
    with pytest.raises(FormatError, match="to go on all the same"):
        problems.refuse("it", every)


def test_empty_parameters_are_named():
    site, delta = lora(net(), "first")
    assert problems.hollow([(site, delta)]) == []
    delta.A = nn.Parameter(torch.zeros(0))
    ((kind, text),) = problems.hollow([(site, delta)])
    assert kind == "fit" and text.startswith("1 parameters are empty: first.A; gather")


# Rounding


@pytest.mark.parametrize("in_peft", [True, False])
def test_narrower_tensors_are_those_of_a_rounded_change(in_peft):
    model = net()
    found = [lora(model, "first"), other(model, "norm", "full"), rows(model, [1, 4])]
    found.append(other(model, "second", "bottleneck", rank=1))
    with torch.no_grad():
        found[1][1].D.copy_(numbers(8, 1))
    saved = rounding.as_saved(found, torch.bfloat16, in_peft)
    A = found[0][1].A.detach()
    assert torch.equal(saved[0][1].A.detach(), A.bfloat16().float()) and not torch.equal(saved[0][1].A, A)
    assert torch.equal(found[0][1].A, A)
    assert (saved[1][1] is found[1][1]) == in_peft  # PEFT keeps whole modules in the base's dtype
    ids = torch.tensor([1, 4])
    assert rounding.rounded(ids, torch.bfloat16) is ids and rounding.rounded(A, None) is A
    assert rounding.rounded(A, torch.float16).dtype == torch.float16


def test_a_change_of_zeros_is_rounded_to_zeros():
    model = net()
    site, delta = lora(model, "first")
    with torch.no_grad():
        delta.B.zero_()
    ((_, saved),) = rounding.as_saved([(site, delta)], torch.float16, True)
    assert not saved.B.any()


def test_a_format_that_loses_too_much_is_refused_with_the_worst_first():
    model = net()
    small, smaller = lora(model, "first"), lora(model, "second")
    with torch.no_grad():
        small[1].B.fill_(1e-7), smaller[1].B.fill_(1e-9)  # 2 and 0 times the smallest number, 2^-24
    with pytest.raises(FormatError) as e:
        rounding.as_saved([small, smaller, lora(model, "embed")], torch.float16, False)
    text = str(e.value)
    assert text.startswith(
        "in torch.float16 these changes would lose more than 5% of themselves: second (100%), first (19%);"
    )
    with pytest.raises(ConfigError, match=r"saved in torch\.float32, .*, not in torch\.float64"):
        rounding.as_saved([small], torch.float64, True)


# The manifest


def described(found, config=None):
    by_name = {s.name: Size(2.0, 3.0, 0.0) for s, _ in found}
    return manifest.describe(found, by_name, {"first": {"start_rank": 1}}, config)


def test_the_manifest_tells_the_method_of_the_adapter_and_of_each_layer():
    model = net()
    whole, low = other(model, "norm", "full"), lora(model, "first", alpha=4.0)
    second = lora(model, "second", alpha=6.0, dropout=0.1)
    config = {n: {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0} for n in ("first", "second", "embed")}
    config["second"]["use_rslora"] = True
    found = described([whole, rows(model, [1]), low, second], config)
    assert (found["method"], found["layout"]) == ("lora", "peft")
    assert [s["method"] for s in found["sites"].values()] == ["full", "token_rows", "lora", "lora"]
    assert {n: s.get("scaling") for n, s in found["sites"].items()} == {
        "norm": None,
        "embed": 1.5,
        "first": 1.5,
        "second": 3.0,
    }
    assert found["options"] == low[1].options and found["sites"]["first"]["options"] == {}
    assert found["sites"]["second"]["options"]["alpha"] == 6.0
    assert {n: s.get("rank") for n, s in found["sites"].items() if n != "norm"} == {
        "embed": 1,
        "first": 2,
        "second": 2,
    }
    assert found["sites"]["first"]["own"] == {"start_rank": 1} and found["sites"]["second"]["own"] == {}
    for site, delta in (low, second):
        assert manifest.site_options(found, site.name) == delta.options
    assert manifest.site_options(found, "embed") == {"tokens": [1], "words": []}
    alone = described([other(model, "norm", "full"), rows(model, [1])])
    assert (alone["method"], alone["layout"]) == ("full", "native")


def test_numbers_that_json_lacks_are_none():
    site, delta = lora(net(), "first")
    for value, kept in ((math.nan, None), (math.inf, None), (2.5, 2.5)):
        found = manifest.describe([(site, delta)], {"first": Size(value, value, 0.0)}, {}, None)
        assert found["sites"]["first"]["norm"] == found["sites"]["first"]["base_norm"] == kept


PROBE = dict.fromkeys(manifest.INSIDE["probe"], 0)
WHOLE = {
    **dict.fromkeys(manifest.REQUIRED, 0),
    "format": 1,
    "sites": {},
    "base": {"sha256": "", "tensors": {}},
    "tensors": {"sha256": ""},
    "probe": PROBE,
    "veneer": "9.9",
}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({}, None),
        ({"probe": None, "no_probe": "the model has no text"}, None),
        ({"probe": None}, "is damaged at probe;"),
        ({"probe": {**PROBE, "off": ...}}, "is damaged at probe;"),
        ({"base": None}, "is damaged at base, tensors, sites;"),
        ({"tensors": None}, "is damaged at base, tensors, sites;"),
        ({"sites": []}, "is damaged at base, tensors, sites;"),
        ({"base": 3}, "is damaged at base;"),
        ({"base": {"sha256": ""}}, "is damaged at base;"),
        ({"tensors": {}}, "is damaged at tensors;"),
        ({"format": 2}, "has format 2, not 1; read it with Veneer 9.9, which wrote it"),
        ({"layout": ..., "allow": ...}, "lacks layout, allow; restore it"),
    ],
)
def test_a_manifest_that_is_damaged_says_where(edit, said, tmp_path):
    found = {k: v for k, v in {**WHOLE, **edit}.items() if v is not ...}
    if isinstance(found.get("probe"), dict):
        found["probe"] = {k: v for k, v in found["probe"].items() if v is not ...}
    (tmp_path / manifest.NAME).write_text(json.dumps(found))
    if said is None:
        assert manifest.record_of(tmp_path) == found
        return
    with pytest.raises(FormatError) as e:
        manifest.record_of(tmp_path)
    assert said in str(e.value)


# Our own layout, and folders


def rebuilt(model, found, edit=lambda tensors: tensors):
    state = {f"{s.name}.{k}": t for s, d in found for k, t in d.state_dict().items()}
    return native.rebuild(model, described(found), edit(state))


def test_every_kind_of_change_comes_back():
    model = net()
    site, dora = other(model, "second", "dora", rank=2)
    found = [lora(model, "first"), (site, Biased(site, dora, numbers(5))), rows(model, [1, 4])]
    again, wrong = rebuilt(model, found)
    assert not wrong and [type(d) for _, d in again] == [LoRA, Biased, TokenRows]
    for (_, a), (_, b) in zip(found, again, strict=True):
        assert all(b.options[k] == v for k, v in a.options.items())
        assert all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())


def test_ranks_that_fell_in_training_come_back():
    model = net()
    site, delta = other(model, "second", "adalora", rank=3, target=1)
    shapes = {"A": (1, 4), "B": (5, 1), "E": (1, 1)}
    delta.resize({n: torch.Size(s) for n, s in shapes.items()})
    with torch.no_grad():
        for p in delta.parameters():
            p.normal_()
    ((_, again),), wrong = rebuilt(model, [(site, delta)])
    assert not wrong and {n: tuple(p.shape) for n, p in again.named_parameters()} == shapes
    assert torch.equal(again.delta(site), delta.delta(site))
    _, wrong = rebuilt(model, [(site, delta)], lambda t: {k: v for k, v in t.items() if k != "second.E"})
    assert any(p.text.startswith("missing: second.E") for p in wrong)


def test_a_method_with_a_tensor_called_as_a_bias_is_itself():
    model = net()
    ((_, again),), wrong = rebuilt(model, [other(model, "second", "vera", rank=2)])
    assert type(again) is methods.get("vera") and not wrong


def test_rows_of_a_tied_weight_are_one_tensor_again():
    model = net()
    model["head"] = nn.Linear(5, 7)
    model["head"].weight = model["embed"].weight
    D = nn.Parameter(numbers(2, 5))
    found = [(s, TokenRows(s, D, [0, 6])) for s in (site_for(n, model[n]) for n in ("embed", "head"))]
    ((_, a), (_, b)), wrong = rebuilt(model, found)
    assert a.D is b.D and torch.equal(a.D, D) and not wrong
    model["head"].weight = nn.Parameter(model["embed"].weight.detach().clone())
    ((_, a), (_, b)), _ = rebuilt(model, found)
    assert a.D is not b.D


def test_everything_that_does_not_fit_our_layout_is_named_once():
    model = net()
    found = [lora(model, "first"), lora(model, "second")]
    smaller = net()
    del smaller["first"]
    again, wrong = rebuilt(smaller, found)
    assert [s.name for s, _ in again] == ["second"]
    assert [tuple(p) for p in wrong] == [("fit", "the model has no layer 'first'")]

    def edited(tensors):
        kept = {k: t for k, t in tensors.items() if k != "first.A"}
        return {**kept, "second.B": torch.zeros(6, 2), "odd.B": torch.zeros(1, 2)}

    again, wrong = rebuilt(model, found, edited)
    assert not again and [tuple(p) for p in wrong] == [
        ("fit", "missing: first.A (2, 3)"),
        ("fit", "wrong shape: second.B is (6, 2), the model asks for (5, 2)"),
        ("unused", "1 tensors belong to no layer: odd.B (1, 2)"),
    ]
    other_kind = net()
    other_kind["first"] = nn.LayerNorm(3)
    again, wrong = rebuilt(other_kind, found)
    assert [s.name for s, _ in again] == ["second"] and [p.kind for p in wrong] == ["fit"]


def test_files_of_other_programs_are_named_without_their_tensors(tmp_path):
    (tmp_path / settings.CONFIG).write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(FormatError, match=r"this adapter_config\.json is mlx-lm's"):
        folder.open_folder(tmp_path)


def test_the_adapter_that_is_saved_without_a_name():
    model = net()
    with pytest.raises(ConfigError, match="the model has no adapter"):
        store.only(model)
    veneer.attach(model, "lora", to=["first"], rank=1, name="fr")
    assert store.only(model) == "fr"
    veneer.attach(model, "lora", to=["first"], rank=1, name="de")
    with pytest.raises(ConfigError, match="several adapters, name one of them: fr, de"):
        store.only(model)
    veneer.attach(model, "lora", to=["first"], rank=1)
    assert store.only(model) == "default"


def test_folders_of_runs_stand_for_the_adapter_in_them(tmp_path):
    assert folder.adapter_folder(tmp_path) == tmp_path
    (tmp_path / "adapter").mkdir()
    assert folder.adapter_folder(tmp_path) == tmp_path / "adapter"
    for name in (settings.CONFIG, settings.TENSORS, manifest.NAME):
        (tmp_path / name).write_text("{}")
        assert folder.holds_one(tmp_path) and folder.adapter_folder(tmp_path) == tmp_path
        (tmp_path / name).unlink()


def test_an_adapter_that_was_read_takes_no_further_words(tmp_path):
    model = veneer.attach(net(), "lora", to=["first"], rank=2)
    with torch.no_grad():
        changes(model, "default")[0][1].B.normal_()
    model.forward = lambda x: model["first"](x)
    veneer.save(model, tmp_path, probe={"x": torch.ones(2, 3)})
    fresh = net()
    fresh.forward = lambda x: fresh["first"](x)
    found = veneer.read(fresh, tmp_path)
    for words in ({"allow": "zero"}, {"initial": tmp_path}):
        with pytest.raises(ConfigError, match=r"pass allow= and initial= to veneer\.read"):
            veneer.load(fresh, found, **words)
    veneer.load(fresh, found)
    assert not any(p.requires_grad for d in changes(fresh, "default") for p in d[1].parameters())
