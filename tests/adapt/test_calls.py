"""The first training step checks which layers are called, and the second what got a gradient."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from support import models
from torch import nn

import veneer
from veneer.adapt import calls
from veneer.adapt.attached import changes, layers
from veneer.errors import ShapeError, SiteError


class Mixer(nn.Module):
    """Calls its last layer in evaluation, and reads its weight in training, as a fused kernel does."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.in_proj(x)
        if self.training:
            return nn.functional.linear(h, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(h)


class Tower(nn.Module):
    """A text part that is always used, and an image part that only images reach."""

    def __init__(self):
        super().__init__()
        self.text = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
        self.vision = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})

    def forward(self, x, image=None):
        for layer in self.text["layers"]:
            x = layer(x)
        for layer in self.vision["layers"] if image is not None else ():
            x = x + layer(image)
        return x


class Experts(nn.Module):
    """Experts of which the first step reaches one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(3))
        self.turn = 0

    def forward(self, x):
        y = self.experts[self.turn % 3]["up"](x)
        self.turn += 1
        return y


class Pair(nn.Linear):
    """A Linear that returns its output and a bias, as some remote code does."""

    def forward(self, x):
        return super().forward(x), None


class WithPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.pair = nn.Linear(8, 8), Pair(8, 8)

    def forward(self, x):
        return self.pair(self.plain(x))[0]


x = torch.linspace(-1, 1, 24).view(3, 8)


def names(model):
    return [site.name for site, _ in changes(model, "default")]


@pytest.mark.parametrize("mode", ["eval", "no grad"])
def test_an_evaluation_before_the_first_step_does_not_count(mode):
    model = nn.Sequential(Mixer())
    veneer.attach(model, "lora", rank=2, to=["in_proj", "out_proj"])
    model.eval()
    if mode == "no grad":
        with torch.no_grad():
            model(x)
    else:
        model(x)
    model.train()
    with pytest.raises(SiteError, match=r"1 adapted layers were never called .*: 0\.out_proj\."):
        model(x)


def test_default_layers_that_are_not_reached_are_dropped_and_counted(tmp_path):
    model = veneer.attach(Tower(), "lora", rank=2)
    assert len(names(model)) == 5
    with pytest.warns(UserWarning, match=r"3 of 5 adapted layers are not reached by this input.*vision"):
        model(x).sum().backward()
    assert names(model) == ["text.layers.0", "text.layers.1"]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.grad is not None for p in trained)
    models.randomise(model)
    veneer.save(model, tmp_path)
    veneer.load(veneer.detach(model), tmp_path)


def test_named_layers_that_are_not_reached_are_an_error():
    model = veneer.attach(Tower(), "lora", rank=2, to=r".*layers.*")
    with pytest.raises(SiteError, match=r"3 adapted layers were never called .*vision\.layers\.0"):
        model(x)


def test_default_layers_that_are_reached_stay():
    model = veneer.attach(Tower(), "lora", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(x, image=x).sum().backward()
    assert len(names(model)) == 5 and not model._forward_hooks


@pytest.mark.parametrize("to", [None, ["up"]])
def test_experts_that_the_first_step_does_not_reach_stay(to):
    model = veneer.attach(Experts(), "lora", rank=2, to=to)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(x).sum().backward()
    assert len(names(model)) == 3
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_that_calls_no_adapted_layer_is_an_error():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.layer.weight

    with pytest.raises(SiteError, match="1 adapted layers were never called"):
        veneer.attach(Idle(), "lora", rank=2)(x)


def test_layers_that_return_no_tensor_are_dropped_by_default_and_refused_by_name():
    model = veneer.attach(WithPair(), "lora", rank=2)
    with pytest.warns(UserWarning, match=r"1 of 2 adapted layers .*pair"):
        model(x).sum().backward()
    assert names(model) == ["plain"]
    named = veneer.attach(WithPair(), "lora", rank=2, to=["plain", "pair"])
    with pytest.raises(SiteError, match="layer 'pair' returns a tuple; only layers returning a tensor"):
        named(x)


def test_layers_smaller_than_the_rank_get_the_largest_that_fits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match=r"1 layers are smaller than the rank .*: 1$"):
        veneer.attach(model, "lora", rank=4, alpha=6.0)
    found = {site.name: delta for site, delta in changes(model, "default")}
    assert found["0"].A.shape[0] == 4 and found["1"].A.shape[0] == 1
    assert found["0"].scaling == found["1"].scaling == 1.5
    rooted = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.warns(UserWarning):
        veneer.attach(rooted, "lora", rank=4, alpha=6.0, stabilised=True)
    assert {round(d.scaling, 12) for _, d in changes(rooted, "default")} == {3.0}


@pytest.mark.parametrize("options", [{"to": ["0", "1"]}, {"rank": 9}])
def test_named_layers_and_a_rank_that_fits_nowhere_are_refused(options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.raises(ShapeError, match="rank"):
        veneer.attach(model, "lora", **{"rank": 4, **options})
    assert not layers(model)


def test_layers_that_a_method_does_not_fit_are_left_out_by_default():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7))
    with pytest.warns(UserWarning, match=r"leaves out 1 layers that the method does not fit"):
        veneer.attach(model, "bat", rank=4)
    assert names(model) == ["0"]


class Detached(nn.Module):
    """A layer whose output the loss does not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.logged = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x) + self.logged(x).detach()


def test_a_trained_parameter_without_gradient_is_named_after_the_first_step():
    model = veneer.attach(Detached(), "lora", rank=2)
    model(x).sum().backward()
    with pytest.raises(SiteError, match=r"2 trained parameters got no gradient .*: logged\.default\.A, "):
        model(x)
    assert not model._forward_hooks
    model(x).sum().backward()


def test_training_loops_ask_for_gradients_themselves():
    model = veneer.attach(Detached(), "lora", rank=2)
    model(x).sum().backward()
    with pytest.raises(SiteError, match=r"2 trained parameters got no gradient .*: logged\.default\.A, "):
        calls.check_gradients(model)
    fine = veneer.attach(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2)
    fine(x).sum().backward()
    calls.check_gradients(fine)
    fine.zero_grad()
    calls.check_gradients(fine)  # of the first step only


class Halves(nn.Module):
    """Only one of two layers is reached, as a tower of a model that gets no pictures."""

    def __init__(self):
        super().__init__()
        self.reached, self.tower = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.reached(x)


def test_layers_that_were_not_called_are_asked_for_no_gradient():
    model = veneer.attach(Halves(), "lora", rank=2)
    model(x).sum().backward()
    calls.check_gradients(model)


def test_experts_that_the_first_step_did_not_reach_are_asked_for_no_gradient():
    model = veneer.attach(Experts(), "lora", rank=2)
    model(x).sum().backward()
    calls.check_gradients(model)


def test_gradients_may_be_gathered_and_dropped_between_steps():
    model = veneer.attach(Tower(), "lora", rank=2, to=r"text.*")
    with torch.no_grad():
        model(x)
    model(x)  # a forward pass that is not learned from
    for _ in range(3):
        model(x).sum().backward()
        model.zero_grad()
    assert not model._forward_hooks


def test_a_model_can_be_copied_and_pickled_between_the_first_steps():
    model = veneer.attach(Tower(), "lora", rank=2, to=r"text.*")
    model(x).sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for _ in range(3):
            twin(x).sum().backward()
        assert not twin._forward_hooks
    veneer.detach(model)
    assert not model._forward_hooks and not [n for n in vars(model) if n.startswith("_gradients")]


def test_compiled_blocks_tell_nothing_of_calls_and_all_of_gradients():
    model = veneer.attach(Tower(), "lora", rank=2, to=r"text.*")
    for layer in model.text["layers"]:
        layer.compile(backend="eager")
    for _ in range(3):
        model(x).sum().backward()
    assert not model._forward_hooks and len(names(model)) == 2


def test_calibration_leaves_out_what_the_text_does_not_reach():
    model = Tower()
    with pytest.warns(UserWarning, match="3 of 5 adapted layers are not reached"):
        stats = veneer.calibrate(model, [x], rank=2, loss=lambda m, b: m(b).square().sum())
    assert sorted(stats) == ["text.layers.0", "text.layers.1"]
    veneer.attach(model, "lora", rank=2, init="loraga", stats=stats)
    assert names(model) == ["text.layers.0", "text.layers.1"]


def test_frozen_experts_are_counted():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 8, bias=False), nn.Module()
            self.experts.up = nn.Parameter(torch.randn(4, 8, 8))

    with pytest.warns(
        UserWarning, match=r"1 stacks of matrices, such as fused experts, hold 80% of the model"
    ):
        veneer.attach(Fused(), "lora", rank=2)


@pytest.mark.parametrize(
    "exclude", [["vision"], ["layers.1"], "vision", r"vision\.layers\.\d", ["vision.layers"]]
)
def test_exclude_means_what_is_inside(exclude):
    model = veneer.attach(Tower(), "lora", rank=2, exclude=exclude)
    expected = {"vision": 2, "layers.1": 3}.get(exclude[0] if isinstance(exclude, list) else exclude, 2)
    assert len(names(model)) == expected


def test_an_exclude_that_leaves_nothing_out_is_an_error():
    with pytest.raises(SiteError, match="exclude='visions' leaves out no layer"):
        veneer.attach(Tower(), "lora", rank=2, exclude=["visions"])
