"""PEFT's files, read and written part by part on small nets: refusals, biases, whole modules, starts."""

from __future__ import annotations

import math

import pytest
import torch
from support import models
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer
from veneer import foreign, methods
from veneer.adapt.attached import changes
from veneer.adapt.peft import parameters, prefixes, reading, rotary, starts, whole, writing
from veneer.adapt.peft.rotary import Turn
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.probe import TOLERANCE
from veneer.adapt.tokens import alone
from veneer.errors import FormatError
from veneer.methods.base.biased import Biased
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.lora import LoRA
from veneer.methods.prefix import Prefix
from veneer.sites import BiasSite, site_for
from veneer.sites.bare.site import ParameterSite
from veneer.sites.finding.kinds import layers_of

DRAW = torch.Generator().manual_seed(5)


def numbers(*shape):
    return torch.randn(*shape, generator=DRAW)


def net(**layers):
    torch.manual_seed(0)
    found = {"first": nn.Linear(3, 4), "second": nn.Linear(4, 5), **layers}
    return nn.ModuleDict(found)


def config(targets, **other):
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets, **other}


def factors(layers):
    """Returns names -> tensors of rank 2 for layers {name: (out, in)}."""
    return {
        f"{PREFIX}{n}.lora_{x}.weight": numbers(*shape)
        for n, (out, in_) in layers.items()
        for x, shape in (("A", (2, in_)), ("B", (out, 2)))
    }


def read(model, settings, tensors, initial=None):
    return reading.to_changes(model, reading.Source(settings, tensors, {}, initial))


def product(tensors, name):
    A, B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"].double() for x in "AB")
    return B @ A


# Reading


def packed():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("odd", ["packed", "a norm"])
def test_layers_that_cannot_be_adapted_are_named_beside_those_that_can(odd):
    model = net(third=packed() if odd == "packed" else nn.LayerNorm(3))
    tensors = factors({"first": (4, 3), "second": (5, 4), "third": (4, 3)})
    found, problems = read(model, config(["first", "second", "third"]), tensors)
    assert [s.name for s, _ in found] == ["first", "second"]
    for site, delta in found:
        torch.testing.assert_close(
            delta.delta(site).double(), 3 * product(tensors, site.name), rtol=1e-5, atol=1e-5
        )
    ((kind, text),) = problems  # its tensors are not unused
    said = "Linear whose weight is packed" if odd == "packed" else "LayerNorm, which cannot be adapted here"
    assert kind == "fit" and text.startswith(f"'third' is a {said}")


def test_a_layer_whose_tensors_do_not_fit_is_named_beside_the_others():
    tensors = factors({"first": (4, 3), "second": (7, 4)})
    found, problems = read(net(), config(["first", "second"]), tensors)
    assert [s.name for s, _ in found] == ["first"]
    assert [p.kind for p in problems] == ["fit"] and problems[0].text.startswith("wrong shape: second.lora_B")


def test_targets_that_no_layer_matches_are_named():
    found, problems = read(net(), config(["first", "third"]), factors({"first": (4, 3)}))
    assert [s.name for s, _ in found] == ["first"]
    assert [p.kind for p in problems] == ["targets"] and "target_modules names third" in problems[0].text
    _, problems = read(net(), config(["third"]), {})
    text = "no layer of the model matches target_modules=['third']; it has e.g. first, second"
    assert [tuple(p) for p in problems] == [("fit", text)]
    large = net(**{n: nn.Linear(2, 2) for n in "abc"})
    _, problems = read(large, config(["third"]), {})
    assert [p.text for p in problems] == [f"{text}, a and 2 more"]


@pytest.mark.parametrize("peft_type", ["LORA", alone.TYPE])
def test_expressions_are_tried_before_they_are_used(peft_type, monkeypatch):
    monkeypatch.setattr(foreign, "_ends", lambda patterns, names: "first" not in names)
    settings = {**config("(a+)+$"), "peft_type": peft_type, "token_indices": [1]}
    reader = alone.to_changes if peft_type == alone.TYPE else read
    with pytest.raises(
        FormatError, match=r"adapter_config\.json: the expression '\(a\+\)\+\$' takes too long"
    ):
        reader(net(), settings, {})


def test_an_end_of_a_name_is_enough():
    model = net(block=nn.ModuleDict({"inner": nn.Linear(3, 4)}))
    tensors = factors({"block.inner": (4, 3), "first": (4, 3)})
    found, problems = read(model, config(["inner", "first"]), tensors)
    assert {s.name for s, _ in found} == {"first", "block.inner"} and not problems


def test_tied_layers_are_read_one_by_one_beside_a_refused_one():
    model = net(third=packed(), fourth=nn.Linear(3, 4))
    model["fourth"].weight = model["first"].weight
    names = ["first", "third", "fourth"]
    tensors = factors(dict.fromkeys(names, (4, 3)))
    found, problems = read(model, config(names), tensors)
    assert [s.name for s, _ in found] == ["first", "fourth"] and len(problems) == 1


@pytest.mark.parametrize("beside", [[], ["first"]])
def test_pairs_of_each_expert_are_read_beside_other_layers(beside):
    model = net(mlp=nn.ModuleDict({"experts": Experts()}))
    pairs = {f"mlp.experts.{e}.{p}_proj": (4, 5) for e in range(3) for p in ("gate", "up")}
    tensors = factors({**pairs, **dict.fromkeys(beside, (4, 3))})
    found, problems = read(model, config([*beside, "gate_proj", "up_proj"]), tensors)
    assert not problems and len(found) == 3 + len(beside)
    for site, delta in found:
        if site.name in beside:
            wanted = product(tensors, site.name)
        else:
            lead = site.name.removesuffix("gate_up_proj")
            wanted = torch.cat([product(tensors, f"{lead}{p}_proj") for p in ("gate", "up")])
        torch.testing.assert_close(delta.delta(site).double(), 3 * wanted, rtol=1e-5, atol=1e-5)


def of_expert(tensors, parts, stabilised):
    """Returns the change of gate and up, one below the other, from the tensors of expert 1."""
    rows = []
    for part in ("gate", "up"):
        r = parts.get(part)
        s = 0.0 if r is None else 6 / (math.sqrt(r) if stabilised else r)
        rows.append(s * product(tensors, f"mlp.experts.1.{part}_proj") if r else torch.zeros(4, 5).double())
    return rows


@pytest.mark.parametrize("interleaved", [None, False, True])
@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    ("parts", "rank"),
    [({"gate": 2, "up": 2}, 2), ({"gate": 2, "up": 3}, 5), ({"up": 3}, 3), ({"gate": 1}, 1)],
)
def test_gate_and_up_of_an_expert_are_one_matrix(parts, rank, stabilised, interleaved):
    """Pairs with one A keep its rank; a part without a pair stays unchanged."""
    model = net(mlp=nn.ModuleDict({"experts": Experts()}))
    if interleaved is not None:
        model["mlp"]["experts"].is_concatenated = not interleaved
    tensors = {}
    for part, r in parts.items():
        lead = f"{PREFIX}mlp.experts.1.{part}_proj.lora_"
        A = (
            tensors[f"{PREFIX}mlp.experts.1.gate_proj.lora_A.weight"]
            if rank == 2 and tensors
            else numbers(r, 5)
        )
        tensors |= {f"{lead}A.weight": A, f"{lead}B.weight": numbers(4, r)}
    names = [f"{part}_proj" for part in parts]
    found, problems = read(model, config(names, use_rslora=stabilised), tensors)
    ((site, delta),) = found
    assert site.name == "mlp.experts.1.gate_up_proj" and not problems and len(delta.A) == rank
    gate, up = of_expert(tensors, parts, stabilised)
    wanted = torch.stack([gate, up], 1).flatten(0, 1) if interleaved else torch.cat([gate, up])
    torch.testing.assert_close(delta.delta(site).double(), wanted, rtol=1e-5, atol=1e-5)


def test_pairs_of_an_expert_are_those_of_plain_lora():
    model = net(mlp=nn.ModuleDict({"experts": Experts()}))
    tensors = factors({"mlp.experts.0.down_proj": (5, 4)})
    assert read(model, config(["down_proj"]), tensors)[0]
    assert not read(model, config(["down_proj"], use_dora=True), tensors)[0]


@pytest.mark.parametrize(("A", "B"), [((2, 6), (4, 2)), ((2, 5), (5, 2)), ((2, 5), (4, 3)), ((2, 5), None)])
def test_pairs_of_an_expert_that_do_not_fit_are_not_read(A, B):
    model = net(mlp=nn.ModuleDict({"experts": Experts()}))
    lead = f"{PREFIX}mlp.experts.0."
    down = {f"{lead}down_proj.lora_A.weight": numbers(2, 4), f"{lead}down_proj.lora_B.weight": numbers(5, 2)}
    odd = {f"{lead}up_proj.lora_{x}.weight": numbers(*s) for x, s in (("A", A), ("B", B)) if s}
    found, problems = read(model, config(["down_proj"]), {**down, **odd})
    assert [s.name for s, _ in found] == ["mlp.experts.0.down_proj"]
    assert [p.kind for p in problems] == ["unused"] and f"{len(odd)} tensors" in problems[0].text
    gate = {f"{lead}gate_proj.lora_A.weight": numbers(2, 5), f"{lead}gate_proj.lora_B.weight": numbers(4, 2)}
    found, _ = read(model, config(["gate_proj", "down_proj"]), {**down, **odd, **gate})
    assert len(found) == (2 if B is None else 1)  # a pair of which half is missing is none


@pytest.mark.parametrize("stacked", [["experts.down_proj"], None])
@pytest.mark.parametrize("names", [["third"], []])
def test_settings_that_name_no_layer_are_refused_unless_they_name_parameters(stacked, names):
    _, problems = read(net(experts=Experts()), config(names, target_parameters=stacked), {})
    said = any(p.text.startswith(f"no layer of the model matches target_modules={names}") for p in problems)
    assert said == (stacked is None or names == ["third"])


def test_layers_are_those_of_the_tensors_where_the_settings_name_none():
    tensors = factors({"second": (5, 4)})
    for none in (None, "all-linear"):
        found, problems = read(net(), config(none), tensors)
        assert [s.name for s, _ in found] == ["second"] and not problems


def test_tensors_of_no_layer_and_copies_of_the_base():
    """Copies that equal the base's are no problem."""
    model = net()
    base = {f"{PREFIX}second.weight": model["second"].weight.detach().clone()}
    tensors = factors({"first": (4, 3)})
    assert not read(model, config(["first"]), {**tensors, **base})[1]
    for t, said in (
        (torch.zeros(5, 4), ": the base is another"),
        (torch.zeros(6, 4), " ((6, 4) in the file, (5, 4) here): resize the vocabulary first: "),
        (torch.zeros(5, 3), " ((5, 3) in the file, (5, 4) here): the base is another"),
    ):
        other = {f"{PREFIX}second.base_layer.weight": t}
        ((kind, text),) = read(model, config(["first"]), {**tensors, **other})[1]
        assert kind == "fit" and text.startswith(
            f"second.weight in the file is another than the base's{said}"
        )
    tied = net(third=nn.Linear(4, 5))
    tied["third"].weight = tied["second"].weight
    copies = {f"{PREFIX}{n}.weight": tied["second"].weight.detach() for n in ("second", "third")}
    assert not read(tied, config(["first"]), {**tensors, **copies})[1]
    odd = {f"{PREFIX}third.weight": torch.zeros(2, 3), "base_model.vera_A": torch.zeros(1)}
    ((kind, text),) = read(model, config(["first"]), {**tensors, **odd})[1]
    assert kind == "unused" and text.startswith("2 tensors belong to no layer: ")
    assert f"{PREFIX}third.weight (2, 3)" in text and "base_model.vera_A (1,)" in text


# Starts that move the base


def moved(stabilised, initial):
    """Returns a change read from a start, and s (B A - B0 A0) in float64."""
    model, tensors = net(), factors({"first": (4, 3)})
    begun = factors({"first": (4, 3)}) if initial else None
    for t in (begun or {}).values():
        t[0, 0] = 0  # a start with a zero in it is one
    start = "lora_ga" if initial else "pissa"
    settings = config(["first"], init_lora_weights=start, use_rslora=stabilised)
    found, problems = read(model, settings, tensors, begun)
    assert not problems
    ((site, delta),) = found
    s = 6 / (math.sqrt(2) if stabilised else 2)
    U, S, Vh = torch.linalg.svd(model["first"].weight.detach().double(), full_matrices=False)
    then = s * product(begun, "first") if initial else U[:, :2] * S[:2] @ Vh[:2]
    return delta.delta(site).double(), s * product(tensors, "first") - then


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("stabilised", [False, True])
def test_a_start_is_taken_off_at_the_scaling_of_the_change(stabilised, initial):
    found, wanted = moved(stabilised, initial)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_start_without_effect_is_plain():
    for end in "AB":
        tensors, begun = factors({"first": (4, 3)}), factors({"first": (4, 3)})
        begun[f"{PREFIX}first.lora_{end}.weight"].zero_()
        ((site, delta),), problems = read(net(), config(["first"], init_lora_weights="corda"), tensors, begun)
        torch.testing.assert_close(
            delta.delta(site).double(), 3 * product(tensors, "first"), rtol=1e-5, atol=1e-5
        )
        assert delta.A0 is None and not problems


def test_embeddings_have_no_start_that_moves_the_base():
    model = net(embed=nn.Embedding(7, 5))
    A, B = numbers(2, 7), numbers(5, 2)
    lead = f"{PREFIX}embed.lora_embedding_"
    given = {f"{lead}A": A, f"{lead}B": B}
    for start, begun in (("pissa", None), ("corda", {f"{lead}A": A + 1, f"{lead}B": B + 1})):
        ((site, delta),), problems = read(model, config(["embed"], init_lora_weights=start), given, begun)
        torch.testing.assert_close(delta.delta(site), 3 * B @ A)
        assert not problems


def test_the_factors_of_olora_are_those_of_the_stored_weight():
    site = site_for("first", net()["first"])
    A, B = starts.olora(site, 2, 7.0)
    Q, R = torch.linalg.qr(site.weight().detach())
    torch.testing.assert_close(B @ A, Q[:, :2] @ R[:2])
    assert A.shape == (2, 3) and B.shape == (4, 2)


def test_a_trained_tensor_of_another_shape_than_the_start_is_named():
    tensors = factors({"first": (4, 3)})
    tensors[f"{PREFIX}first.lora_B.weight"] = torch.zeros(4, 3)
    _, problems = read(net(), config(["first"], init_lora_weights="pissa"), tensors)
    assert len(problems) == 1 and problems[0].text.startswith("wrong shape: first.lora_B.weight is (4, 3)")
    begun = factors({"first": (4, 3)})
    _, problems = read(net(), config(["first"], init_lora_weights="corda"), tensors, begun)
    said = "wrong shape: first.lora_B.weight is (4, 2) in the initial folder, (4, 3) in the trained one"
    assert [p.text for p in problems] == [said]
    del tensors[f"{PREFIX}first.lora_B.weight"]
    _, problems = read(net(), config(["first"], init_lora_weights="corda"), tensors, begun)
    assert len(problems) == 1 and problems[0].text.startswith("missing: first.lora_B.weight")


@pytest.mark.parametrize(
    ("start", "initial", "said"),
    [
        *((plain, False, None) for plain in (True, False, "gaussian", "EVA", "PiSSA", "olora")),
        *((plain, True, "initial= is for starts that move the base") for plain in (True, "mica")),
        *((name, True, None) for name in ("pissa_niter_16", "corda", "lora_ga", "pissa")),
        ("pissa_niter_16", False, "init_lora_weights 'pissa_niter_16': its randomised SVD is not seeded"),
        ("corda", False, "init_lora_weights 'corda': it moves the base by a decomposition over calibration"),
        ("loftq", True, "init_lora_weights 'loftq': it replaces the base"),
        ("cordax", True, "init_lora_weights 'cordax' is not known here; convert it with PEFT"),
        (3, False, "init_lora_weights 3 is not known here"),
    ],
)
def test_starts_that_can_be_read(start, initial, said):
    found = starts.problem(start, initial)
    assert found is None if said is None else found.startswith(said)


# Whole modules


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.drop, self.out_proj = nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)


def test_a_head_is_saved_as_one_module_if_all_of_it_is():
    model = net(classifier=Head())
    inner = ["classifier.dense", "classifier.out_proj"]
    assert whole.saved_modules(model, [*inner, "first"]) == ["classifier", "first"]
    assert whole.saved_modules(model, inner) == ["classifier"]
    assert whole.saved_modules(model, inner[:1]) == inner[:1]
    assert whole.saved_modules(net(score=nn.Linear(3, 2)), ["first"]) == ["first"]
    veneer.attach(model, "lora", to=["classifier.dense"], rank=1)
    assert whole.saved_modules(model, inner) == ["classifier"]
    assert whole.saved_modules(net(body=Head()), ["body.dense", "body.out_proj"]) == [
        "body.dense",
        "body.out_proj",
    ]
    assert whole.outermost(["a.b", "a", "ab", "a.b.c", "ab"]) == ["a", "ab"]


def test_a_whole_module_is_read_beside_an_adapter_inside_it():
    model = veneer.attach(net(classifier=Head()), "lora", to=["classifier.dense"], rank=1)
    names = [f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")]
    given = {f"{PREFIX}{n}": model.get_parameter(n).detach() + i for i, n in enumerate(names)}
    used, problems = set(), []
    found = whole.whole_module(model, "classifier", given, used, problems)
    assert [s.name for s, _ in found] == ["classifier.dense", "classifier.out_proj"]
    wanted = [torch.tensor([0.0] * 16 + [1.0] * 4), torch.tensor([2.0] * 8 + [3.0] * 2)]
    for (_, delta), D in zip(found, wanted, strict=True):
        torch.testing.assert_close(delta.D.detach().flatten(), D)
    assert used == {*given} and not problems


def test_whole_modules_that_do_not_fit_are_named_and_used():
    model, used, problems = net(classifier=Head()), set(), []
    names = [f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")]
    state = {f"{PREFIX}{n}": model.get_parameter(n).detach() for n in names}
    given = {**state, f"{PREFIX}{names[3]}": torch.zeros(3)}
    del given[f"{PREFIX}{names[0]}"]
    assert whole.whole_module(model, "classifier", given, used, problems) == []
    assert [tuple(p) for p in problems] == [
        ("fit", "missing: classifier.dense.weight (4, 4), of a module in modules_to_save"),
        ("fit", "wrong shape: classifier.out_proj.bias is (3,), the model's is (2,)"),
    ]
    assert used == {*state}


# Writing


def lora(model, name, alpha=6.0, dropout=0.0):
    site = site_for(name, model.get_submodule(name))
    A, B = numbers(2, site.in_), numbers(site.out, 2)
    return site, LoRA.holding(site, A, B, alpha=alpha, dropout=dropout)


def of_tokens(model, tokens, name="embed"):
    site = site_for(name, model[name])
    return site, TokenRows(site, nn.Parameter(numbers(len(tokens), 5)), tokens)


def test_all_branches_have_a_bias_if_one_has():
    model = net()
    (one, delta), other = lora(model, "first"), lora(model, "second")
    b = numbers(4)
    written = writing.write(model, [(one, Biased(one, delta, b)), other])
    assert written is not None and written.config["lora_bias"] is True
    torch.testing.assert_close(written.tensors[f"{PREFIX}first.lora_B.bias"], b / 3)
    assert torch.equal(written.tensors[f"{PREFIX}second.lora_B.bias"], torch.zeros(5))
    plain = writing.write(model, [(one, delta), other])
    assert plain is not None and "lora_bias" not in plain.config and len(plain.tensors) == 4


def test_settings_of_single_layers_are_patterns():
    model = net(third=nn.Linear(5, 3))
    found = [lora(model, "first"), lora(model, "second", 1.5), lora(model, "third")]
    written = writing.write(model, found)
    assert written is not None and written.config["target_modules"] == ["first", "second", "third"]
    assert (written.config["lora_alpha"], written.config["alpha_pattern"]) == (6, {"second": 1.5})
    assert written.config["r"] == 2 and written.config["rank_pattern"] == {}


def test_biases_of_the_base_go_with_a_lora_only():
    model = veneer.attach(net(), "bitfit", to=["first"])
    ((site, delta),) = changes(model, "default")
    with torch.no_grad():
        next(delta.parameters()).fill_(2)
    written = writing.write(model, [(site, delta), lora(model, "second")])
    assert written is not None and written.config["bias"] == "all"
    torch.testing.assert_close(written.tensors[f"{PREFIX}first.bias"], model["first"].bias.detach() + 2)
    assert writing.write(model, [(site, delta)]) is None


class Experts(nn.Module):
    """Three experts of hidden size 5 and inner size 4; unlike their real owners they have one more stack."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = (nn.Parameter(numbers(3, *s)) for s in ((8, 5), (5, 4)))
        self.other = nn.Parameter(numbers(3, 4))


def of_experts(model, parameter, rank=2):
    layers = layers_of(model)
    sites = [ParameterSite(n, layers[n]) for n in (f"experts.{e}.{parameter}" for e in range(3))]
    return [(s, LoRA.holding(s, numbers(rank, s.in_), numbers(s.out, rank), alpha=6.0)) for s in sites]


def test_a_stored_transpose_among_other_layers_is_told():
    model = net(third=Conv1D(4, 3))
    for names, told in ((["first", "third"], True), (["first", "second"], False)):
        written = writing.write(model, [lora(model, n) for n in names])
        assert written is not None and written.config["fan_in_fan_out"] == told


def test_all_experts_of_a_parameter_are_one_pair():
    """Row e r + k of A, column k E + e of B; the first of two parameters has one base_layer more."""
    model = net(experts=Experts())
    up, down = of_experts(model, "gate_up_proj"), of_experts(model, "down_proj")
    written = writing.write(model, [down[2], *up[::-1], *down[:2]])
    assert written is not None
    assert written.config["target_parameters"] == ["down_proj", "gate_up_proj"]
    assert written.config["target_modules"] == [] and len(written.tensors) == 4
    for lead, found in (("experts.base_layer.", up), ("experts.", down)):
        A, B = (written.tensors[f"{PREFIX}{lead}lora_{x}.weight"] for x in "AB")
        for e, (site, delta) in enumerate(found):
            change = 3 * B[:, [e, 3 + e]] @ A[2 * e : 2 * e + 2]
            torch.testing.assert_close(change, delta.delta(site).detach(), rtol=1e-5, atol=1e-5)
    again, problems = read(model, written.config, written.tensors)
    assert not problems and {s.name for s, _ in again} == {s.name for s, _ in [*up, *down]}
    wanted = {s.name: d.delta(s) for s, d in [*up, *down]}
    assert all(torch.allclose(d.delta(s), wanted[s.name], rtol=1e-5, atol=1e-5) for s, d in again)


def test_experts_that_are_not_one_pair_are_not_written():
    model = net(experts=Experts())
    every = of_experts(model, "down_proj")
    site, _ = every[1]
    other = site, methods.build(methods.get("loha"), site, {"rank": 2})
    more = of_experts(model, "down_proj", rank=1)[1]
    dropped = [(s, LoRA.holding(s, d.A, d.B, alpha=6.0, dropout=0.1)) for s, d in every]
    for changed in (dropped, [every[0], every[2]], [every[0], other, every[2]], [every[0], more, every[2]]):
        assert writing.write(model, changed) is None


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("experts.other", r"target_parameters: experts.other (3, 4) must be fused experts of a known layout"),
        ("first.weight", r"target_parameters: first.weight (4, 3) must be fused experts of a known layout"),
        ("experts.nothing", "target_parameters names 'experts.nothing', which no parameter"),
        ("experts.down_proj", "missing: experts.lora_A.weight"),
    ],
)
def test_parameters_that_cannot_be_read_are_named(target, said):
    changes, problems = read(net(experts=Experts()), config([], target_parameters=[target]), {})
    assert not changes and problems[0].kind == "fit" and problems[0].text.startswith(said)


def test_an_ending_that_means_more_is_not_written():
    model = net(experts=Experts(), block=nn.ModuleDict({"experts": Experts()}))
    every = ["experts.down_proj", "block.experts.down_proj"]
    assert parameters.target_names(model, every[1:]) == every[1:]
    assert parameters.target_names(model, every) == sorted(["down_proj", "experts.down_proj"])


def other(model, name, method):
    layer = model.get_submodule(name)
    site = BiasSite(name, layer) if method == "bitfit" else site_for(name, layer)
    options = {} if method in ("bitfit", "ia3") else {"rank": 1}
    return site, methods.build(methods.get(method), site, options)


def test_changes_that_one_file_of_pefts_cannot_hold_are_not_written():
    model = net(conv=nn.Conv1d(2, 3, 2), embed=nn.Embedding(7, 5))
    first, second, conv = lora(model, "first"), lora(model, "second"), lora(model, "conv")
    assert writing.write(model, [first, second, conv]) is not None
    biased = [(s, Biased(s, d, numbers(s.out))) for s, d in (first, conv, other(model, "first", "dora"))]
    assert writing.write(model, [biased[0], second]) is not None
    bias, rows = other(model, "first", "bitfit"), [of_tokens(model, [1])]
    assert writing.write(model, [bias, second]) is not None
    assert writing.write(model, [*rows, second]) is not None
    twins = [other(model, n, "vera") for n in ("first", "second")]
    written = writing.write(model, twins)
    assert written is not None and "rank_pattern" not in written.config
    assert {n for n in written.tensors if not n.startswith(PREFIX)} == {
        "base_model.vera_A",
        "base_model.vera_B",
    }
    with torch.no_grad():  # no longer parts of one tensor
        for t in twins[1][1].to_peft(twins[1][0]).shared.values():
            t.add_(1)
    for odd in (
        [first, other(model, "second", "bottleneck")],
        [first, other(model, "second", "loha")],
        [other(model, "first", "vera"), second],
        [first, lora(model, "second", dropout=0.1)],
        [biased[2]],
        [bias, other(model, "first", "ia3")],
        [*rows, other(model, "first", "ia3")],
        twins,
        [biased[0], other(model, "second", "bottleneck")],
        [biased[1], second],
        [biased[2], second],
    ):
        assert writing.write(model, odd) is None


def test_tensors_that_layers_share_are_read_and_used():
    model = net()
    found = [other(model, n, "vera") for n in ("first", "second")]
    with torch.no_grad():
        for _, delta in found:
            for p in delta.parameters():
                p.normal_()
    written = writing.write(model, found)
    again, problems = read(net(), written.config, written.tensors)
    assert not problems
    for (site, given), (_, delta) in zip(found, again, strict=True):
        torch.testing.assert_close(delta.delta(site), given.delta(site), rtol=1e-5, atol=1e-5)


def test_rows_alone_are_written_if_they_are_of_the_same_tokens():
    model = net(embed=nn.Embedding(7, 5), head=nn.Linear(5, 7))
    both = [of_tokens(model, [1, 4], n) for n in ("embed", "head")]
    written = writing.write(model, both)
    assert written is not None and written.config["peft_type"] == "TRAINABLE_TOKENS"
    assert written.config["token_indices"] == [1, 4]
    assert written.config["target_modules"] == ["embed", "head"]
    assert writing.write(model, [both[0], of_tokens(model, [1, 5], "head")]) is None
    assert writing.write(model, both, ["first"]) is None


def test_shared_tensors_are_written_at_the_largest_size():
    """Parts must be the beginning of the largest one."""
    small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(writing._shared([{"A": small}, {"A": large}], {})["A"], large)
    wide = writing._shared([{"A": large}, {"A": small}], {"A": (1, 3)})["A"]
    assert torch.equal(wide, torch.tensor([[1.0, 2, 0], [3, 4, 0]]))
    assert writing._shared([{"A": small}, {"A": large + 1}, {"A": large}], {}) is None


def prefix(model, layer, length=3):
    name = f"model.layers.{layer}.self_attn"
    site = next(s for s in Prefix.find(model, None) if s.name == name)
    delta = methods.build(Prefix, site, {"length": length})
    with torch.no_grad():
        delta.K.normal_(), delta.V.normal_()
    return site, delta


def test_prefixes_go_to_peft_if_every_layer_has_one_of_one_length():
    model = models.llama()
    both = [prefix(model, 1), prefix(model, 0)]
    written = prefixes.write(model, both)
    assert written is not None and written.tensors[prefixes.TENSOR].shape == (3, 2 * 2 * 2 * 8)
    again, problems = prefixes.to_changes(model, written.config, written.tensors)
    assert not problems
    for (_, given), (_, found) in zip(both[::-1], again, strict=True):
        torch.testing.assert_close(found.K, given.K, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.V, given.V)
    assert prefixes.write(model, both[:1]) is None
    assert prefixes.write(model, [both[0], prefix(model, 0, 4)]) is None
    for shape in ((3, 63), (3, 64, 1), (64,)):
        _, problems = prefixes.to_changes(model, written.config, {prefixes.TENSOR: torch.zeros(shape)})
        said = f"wrong shape: prompt_embeddings is {shape}, the model asks for (p, 64): keys and values of 2"
        assert len(problems) == 1 and problems[0].text.startswith(said)


# Turning keys


@pytest.mark.parametrize("neighbours", [False, True])
def test_keys_turn_by_the_distance(neighbours):
    """Pairs are (0, 1), (2, 3), or (0, 2), (1, 3); the fifth number is in no pair."""
    keys, radians = numbers(2, 3, 5).double(), torch.tensor([0.3, 0.05], dtype=torch.float64)
    found = rotary.turned(keys, Turn(radians, neighbours), -4)
    wanted = keys.clone()
    for n, (i, j) in enumerate([(0, 1), (2, 3)] if neighbours else [(0, 2), (1, 3)]):
        c, s = math.cos(-4 * radians[n]), math.sin(-4 * radians[n])
        wanted[..., i] = c * keys[..., i] - s * keys[..., j]
        wanted[..., j] = s * keys[..., i] + c * keys[..., j]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_model_without_token_ids_cannot_be_measured():
    model = net()
    assert rotary.turns(model) == "its positions are not rotary"
    model.register_buffer("inv_freq", torch.ones(2))
    assert rotary.turns(model) == "its keys could not be read (KeyError)"


def test_more_pairs_than_numbers_do_not_fit():
    keys = torch.zeros(1, 4)
    assert not rotary._fits(Turn(torch.ones(3), False), keys, keys)
    assert rotary._fits(Turn(torch.ones(2), False), keys, keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_fit_up_to_rounding(dtype):
    turn = Turn(torch.tensor([0.2]), False)
    here = numbers(8, 2).to(dtype)
    there = rotary.turned(here, turn, rotary.FAR).double()
    most = 4 * TOLERANCE[str(dtype).removeprefix("torch.")]
    assert rotary._fits(turn, here, there / (1 - 0.9 * most))
    assert not rotary._fits(turn, here, there / (1 - 1.1 * most))
    assert not rotary._fits(turn, here, rotary.turned(here, turn, rotary.FAR + 3))
