"""Hooks, notes and flags that attaching leaves, restores and drops, on small models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.models import randomise
from torch import nn

import veneer
from veneer.adapt import base_notes, calls
from veneer.adapt.attached import changes, layers, n_base_parameters
from veneer.adapt.combine import combine
from veneer.errors import ConfigError, SiteError

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


class Scaled(nn.Linear):
    """A layer with a second argument, by place or by name."""

    def forward(self, x, scale, *, shift=0.0):
        return super().forward(x) + scale + shift


class Owner(nn.Module):
    def __init__(self, kind=Scaled):
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(6, 5)

    def forward(self, x):
        return self.layer(x, x[:, :5] * 2, shift=1.0) if type(self.layer) is Scaled else self.layer(x)


def hooks(model):
    pre = sum(len(m._forward_pre_hooks) for m in model.modules())
    return pre, sum(len(m._forward_hooks) for m in model.modules() if m is not model)


@pytest.mark.parametrize(("method", "options"), [("lora", {"rank": 2}), ("oft", {"block": 2})])
def test_other_arguments_of_a_layer_stay(method, options):
    model = veneer.attach(Owner().double(), method, to=["layer"], **options)
    randomise(model, size=0.3)
    merged = copy.deepcopy(model)
    veneer.merge(merged, probe={})
    torch.testing.assert_close(model(X), merged(X), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method", "pre"), [("lora", 0), ("ia3", 0), ("oft", 1)])
def test_inputs_get_one_hook_and_only_where_a_change_needs_it(method, pre):
    options = {"lora": {"rank": 2}, "ia3": {}, "oft": {"block": 2}}[method]
    model = Owner(nn.Linear).double()
    for name in ("a", "b"):
        veneer.attach(model, method, to=["layer"], name=name, **options)
        randomise(model, name, size=0.3)
    assert hooks(model) == (pre, 1)
    alone = veneer.attach(Owner(nn.Linear).double(), method, to=["layer"], name="b", **options)
    randomise(alone, "b", size=0.3)
    with veneer.using(model, "b"), torch.no_grad():
        torch.testing.assert_close(model(X), alone(X), rtol=1e-12, atol=1e-12)
    veneer.detach(model, "a")
    with torch.no_grad():
        torch.testing.assert_close(model(X), alone(X), rtol=1e-12, atol=1e-12)
    veneer.detach(model)
    assert hooks(model) == (0, 0)


def test_adapters_of_other_names_were_not_found_by_default():
    model = Owner(nn.Linear)
    veneer.attach(model, "lora", rank=2, name="a")
    veneer.attach(model, "lora", rank=2, name="b", to="all-linear")
    assert layers(model)[0].by_default == {"a", "b"}
    veneer.detach(model, "a")
    veneer.attach(model, "lora", rank=2, name="a", to=["layer"])
    combine(model, {"a": 1.0}, "sum")
    assert layers(model)[0].by_default == {"b"}


class Branches(nn.Module):
    """Layers that are called, left alone, or return a pair."""

    def __init__(self):
        super().__init__()

        class Pair(nn.Linear):
            def forward(self, x):
                return super().forward(x), None

        self.used, self.silent, self.pair = nn.Linear(6, 6), nn.Linear(6, 6), Pair(6, 6)

    def forward(self, x):
        return self.pair(self.used(x))[0]


def test_a_named_layer_that_is_silent_is_an_error_beside_others_that_are_dropped():
    model = veneer.attach(Branches().double(), "lora", rank=2)
    veneer.attach(model, "lora", rank=2, name="named", to=["silent"])
    veneer.activate(model, "default", "named")
    with pytest.raises(SiteError, match=r"1 adapted layers were never called .*: silent\."):
        model(X)


@pytest.mark.parametrize("to", [None, "all-linear"])
def test_layers_found_by_default_are_dropped_once(to):
    model = veneer.attach(Branches().double(), "lora", rank=2, to=to)
    with pytest.warns(UserWarning, match=r"2 of 3 adapted layers are not reached .*: silent, pair"):
        model(X).sum().backward()
    assert [d.site.name for d in layers(model)] == ["used"]


def test_a_model_is_watched_once_and_again_for_a_new_adapter():
    model = Owner(nn.Linear).double()
    handle = model.register_forward_hook(lambda *event: None)
    for name in ("a", "b"):
        veneer.attach(model, "lora", rank=2, name=name)
    assert len(model._forward_hooks) == 2
    handle.remove()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(X).sum().backward()
    assert any(p._post_accumulate_grad_hooks for p in trained)
    calls.check_gradients(model)
    model(X)
    assert not model._forward_hooks and not any(p._post_accumulate_grad_hooks for p in trained)
    veneer.attach(model, "lora", rank=2, name="c")
    model(X)
    with pytest.raises(SiteError, match="got no gradient"):
        calls.check_gradients(model)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.logged = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x) + self.logged(x).detach()


@pytest.mark.parametrize("compiled", [["used"], ["used", "logged"]])
def test_compiled_layers_are_asked_for_gradients_and_not_for_calls(compiled):
    model = veneer.attach(Detached().double(), "lora", rank=2)
    for name in compiled:
        getattr(model, name).compile(backend="eager")
    model(X).sum().backward()
    with pytest.raises(SiteError, match=r"2 trained parameters got no gradient .*: logged\.default\.A"):
        model(X)


def test_the_base_trains_again_as_before_the_first_adapter():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    veneer.train_only(model)  # nothing, without an adapter
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    model[0].bias.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for name in ("a", "b"):
        veneer.attach(model, "lora", rank=2, name=name)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.deltas.b.{n}" for i in (0, 1) for n in "AB"
    }
    veneer.train_only(model, "base")
    assert all(p.requires_grad == ("deltas" not in n) for n, p in model.named_parameters())
    veneer.train_only(model, "base", "a")
    assert all(p.requires_grad == (".b." not in n) for n, p in model.named_parameters())
    veneer.detach(model, "a")
    veneer.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert not [n for n in vars(model) if n.startswith(("_base", "_trained"))]


def test_a_quantised_base_is_counted_whole_and_not_trained():
    torch.manual_seed(0)
    layer = veneer.quantise(nn.Sequential(nn.Linear(64, 32)), "int8")
    model = nn.Sequential(layer[0], nn.Linear(32, 4))
    wanted = 64 * 32 + 32 + 32 * 4 + 4
    assert n_base_parameters(model) == wanted
    veneer.attach(model, "lora", rank=2)
    assert n_base_parameters(model) == wanted
    veneer.train_only(model, "default")
    with pytest.raises(ConfigError, match="a quantised base cannot be trained"):
        veneer.train_only(model, "base")


def test_parameters_trained_beside_an_adapter_are_noted_from_its_start():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6))
    with torch.no_grad():
        model[0].weight.add_(1)
    veneer.attach(model, "lora", rank=2, name="a")
    veneer.train_only(model, "a", "base")
    assert base_notes.trained_beside(model, "a") == []
    model.register_parameter("later", nn.Parameter(torch.ones(2)))
    with torch.no_grad():
        for p in (model[0].weight, model[1].weight, model.later):
            p.add_(1)
    veneer.attach(model, "lora", rank=2, name="b")
    veneer.train_only(model, "a", "base")
    model[1].weight.requires_grad_(False)
    assert base_notes.trained_beside(model, "a") == ["0.weight"]
    assert base_notes.trained_beside(model, "b") == []
    veneer.detach(model, "a")
    assert base_notes.trained_beside(model, "a") == []


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing_are_refused(pattern):
    with pytest.raises(ConfigError, match="matches no adapted layer: nope"):
        veneer.attach(nn.Sequential(nn.Linear(6, 6)), "lora", rank=2, **{pattern: {"nope": 1}})


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 8, bias=False), nn.Module()
        self.experts.up = nn.Parameter(torch.randn(4, 8, 8))


@pytest.mark.parametrize(
    ("model", "method", "text"),
    [
        (Fused, "lora", "1 stacks of matrices, such as fused experts, hold 80%"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), "lora", "1 layers are smaller than"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7)), "bat", "leaves out 1 layers"),
    ],
)
def test_warnings_of_attach_name_the_caller_s_line(model, method, text):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        veneer.attach(model(), method, rank=4)
    (own,) = [w for w in found if text in str(w.message)]
    assert own.filename == __file__


@pytest.mark.parametrize("equal", [["a"], ["b"], ["a", "b"], []])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_changes_of_two_layers_are_one_only_if_all_are_equal_and_the_layers_tied(tied, equal):
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            if tied:
                self.last.weight = self.first.weight

    model = Ends().double()
    wanted = {n: getattr(model, n).weight.detach().clone() for n in ("first", "last")}
    for name in ("a", "b"):
        veneer.attach(model, "full", to=["first", "last"], name=name)
        (_, one), (_, two) = changes(model, name)
        with torch.no_grad():
            one.D.normal_()
            two.D.copy_(one.D if name in equal else torch.randn_like(one.D))
            wanted["first"] += one.D.view(4, 4)
            wanted["last"] += two.D.view(4, 4)
    veneer.merge(model, "a", "b", probe={})
    for name, W in wanted.items():
        torch.testing.assert_close(getattr(model, name).weight.detach(), W, rtol=1e-12, atol=1e-12)
    assert (model.first.weight is model.last.weight) == (tied and len(equal) == 2)
