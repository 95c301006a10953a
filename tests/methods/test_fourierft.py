"""FourierFT against PEFT and a dense transform; its size, its memory, and frequencies that are saved and not
drawn again."""

from __future__ import annotations

import peft
import pytest
import torch
from support.kept import kept_bytes
from support.models import gpt2, llama, output, randomise
from support.peer import agrees_with_peft
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, ShapeError
from veneer.methods.fourierft import _frozen
from veneer.ops import fourier
from veneer.sites import site_for

TO = ["q_proj", "k_proj", "down_proj"]


def test_same_outputs_gradients_and_files_as_peft(tmp_path):
    shared = {"task_type": "CAUSAL_LM", "n_frequency": 70, "init_weights": True}
    config = peft.FourierFTConfig(target_modules=TO, scaling=200.0, random_loc_seed=5, **shared)
    agrees_with_peft(tmp_path, "fourierft", {"frequencies": 70, "scaling": 200.0, "seed": 5}, TO, config)
    where = ["c_attn"]
    config = peft.FourierFTConfig(target_modules=where, fan_in_fan_out=True, **shared)
    (tmp_path / "gpt2").mkdir()
    agrees_with_peft(
        tmp_path / "gpt2", "fourierft", {"frequencies": 70, "scaling": 200.0}, where, config, gpt2
    )


def test_a_scaling_by_shape_is_read_by_peft_too(tmp_path):
    model = veneer.attach(llama(), "fourierft", to=TO, frequencies=50, rms=0.02)
    randomise(model)
    veneer.save(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(output(opened), output(model), rtol=1e-4, atol=1e-5)
    again = veneer.load(llama(), tmp_path)
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-6)
    for (_, a), (_, b) in zip(changes(again, "default"), changes(model, "default"), strict=True):
        assert a.scaling == b.scaling and torch.equal(a.rows, b.rows)
        torch.testing.assert_close(a.c, b.c)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("out", "in_"), [(6, 8), (7, 9), (6, 9), (7, 8), (1, 5), (5, 1), (2, 2)])
def test_every_parity_of_sizes_and_every_frequency_by_both_ways(out, in_, small, monkeypatch):
    monkeypatch.setattr(fourier, "_small", lambda *a: small)
    model = veneer.attach(
        nn.Sequential(nn.Linear(in_, out).double()), "fourierft", frequencies=out * in_, scaling=30.0
    )
    randomise(model, size=1.0)
    site, delta = changes(model, "default")[0]
    x = torch.randn(2, 3, in_, dtype=torch.float64, requires_grad=True)
    F = torch.zeros(out, in_, dtype=torch.float64).index_put((delta.rows, delta.columns), delta.c.detach())
    D = torch.fft.ifft2(F).real * 30.0
    torch.testing.assert_close(delta.delta(site), D)
    torch.testing.assert_close(model(x), model[0](x) * 0 + x @ (site.weight() + D).mT + model[0].bias)
    inputs = (x, delta.c.detach().requires_grad_())
    y = torch.randn(2, 3, out, dtype=torch.float64, requires_grad=True)
    for writable in (False, True):

        def sums(y, z, c, w=writable):
            return fourier.added(y * 1, z, c, delta.rows, delta.columns, writable=w)

        assert torch.autograd.gradcheck(sums, (y, *inputs))


@pytest.mark.parametrize("trained", [(), ("base",)])
@pytest.mark.parametrize("grad", [True, False])
def test_gradients_beside_a_frozen_and_a_trained_layer(trained, grad):
    """Beside a frozen W one product makes the gradient of x for both; a trained one keeps its own
    backward."""
    model = veneer.attach(nn.Sequential(nn.Linear(8, 6).double()), "fourierft", frequencies=20, scaling=30.0)
    randomise(model, size=1.0)
    veneer.train_only(model, "default", *trained)
    layer, (site, delta) = model[0], changes(model, "default")[0]
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=grad)
    wanted = [*([x] if grad else []), delta.c, *(layer.parameters(recurse=False) if trained else [])]
    y = model(x)
    expected = nn.functional.linear(x, layer.weight + delta.delta(site), layer.bias)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), wanted) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("trained", [(), ("base",)])
def test_gradients_under_autocast_have_the_precision_of_bfloat16(trained):
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Linear(24, 16)), "fourierft", frequencies=20, scaling=30.0)
    randomise(model, size=1.0)
    veneer.train_only(model, "default", *trained)
    layer, (site, delta) = model[0], changes(model, "default")[0]
    x = torch.randn(8, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    exact = nn.functional.linear(x, layer.weight + delta.delta(site), layer.bias)
    wanted = [x, delta.c, *(layer.parameters(recurse=False) if trained else [])]
    pairs = zip(*(torch.autograd.grad(out.float().sin().sum(), wanted) for out in (y, exact)), strict=True)
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= 0.03 * expected.norm()  # some roundings of 2**-9 each


def test_working_memory_serves_inference_and_training_in_turns():
    """Its tensors are used again, in whatever mode they were made."""
    model = veneer.attach(nn.Sequential(nn.Linear(8, 6)), "fourierft", frequencies=20, scaling=30.0)
    randomise(model, size=1.0)
    x = torch.randn(40, 8)
    with torch.inference_mode():
        y = model(x)
    first = model(x)
    first.square().sum().backward()
    torch.testing.assert_close(first, y.clone())
    torch.testing.assert_close(model(x), first)


def test_the_size_of_a_change_does_not_depend_on_the_width():
    for width in (16, 64, 256):
        model = veneer.attach(nn.Sequential(nn.Linear(width, width)), "fourierft", frequencies=40, rms=0.01)
        site, delta = changes(model, "default")[0]
        with torch.no_grad():
            delta.c.normal_(generator=torch.Generator().manual_seed(0))
        rms = float(delta.delta(site).square().mean().sqrt() / delta.c.norm())
        assert 0.008 < rms < 0.012  # frequencies 0 and half count twice


@pytest.mark.parametrize(
    ("frequencies", "rows", "columns"),
    [
        (1, 1, 1),
        (4, 2, 2),
        (5, 2, 2),
        (6, 3, 2),
        (9, 3, 3),
        (12, 4, 3),
        (17, 5, 3),
        (40, 7, 3),
    ],  # of the 5 columns 3 say all
)
def test_a_grid_is_near_a_square_and_has_no_frequency_twice(frequencies, rows, columns):
    model = veneer.attach(
        nn.Sequential(nn.Linear(5, 7)), "fourierft", frequencies=min(frequencies, 35), grid=True
    )
    _, d = changes(model, "default")[0]
    assert d.c.shape == (rows, columns)
    assert len(set(d.rows.tolist())) == rows and set(d.rows.tolist()) <= set(range(7))
    assert len(set(d.columns.tolist())) == columns and set(d.columns.tolist()) <= {0, 1, 2}


def test_nothing_of_the_size_of_the_weight_is_kept():
    x = torch.randn(8, 512)
    for grid in (False, True):
        model = veneer.attach(
            nn.Sequential(nn.Linear(512, 512, bias=False)), "fourierft", frequencies=100, grid=grid
        )
        assert kept_bytes(model, x.clone()) < 0.2 * 512 * 512 * 4


def test_frequencies_come_from_the_file(tmp_path, monkeypatch):
    for options in ({"frequencies": 12}, {"frequencies": 16, "grid": True}):
        model = veneer.attach(llama(), "fourierft", rms=0.01, **options)
        randomise(model)
        for _, d in changes(model, "default"):
            d.load_state_dict(
                {**d.state_dict(), "rows": (d.rows + 1) % 16}
            )  # as another version might have drawn them
        veneer.save(model, tmp_path / str(len(options)))
        again = veneer.load(llama(), tmp_path / str(len(options)))
        torch.testing.assert_close(output(again), output(model), rtol=0, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        ShapeError, match=r"frequencies must be from 1 to out \* in = 512 at '.*k_proj', got 1000; use fewer"
    ):
        veneer.attach(llama(), "fourierft", to=["k_proj"])
    with pytest.raises(ConfigError, match=r"^rms must be a number above 0, got 0\.0$"):
        veneer.attach(llama(), "fourierft", frequencies=10, rms=0.0)


def test_one_product_backward_stands_for_both_only_beside_a_frozen_layer():
    layer = nn.Linear(4, 3)
    assert _frozen(site_for("0", layer)) is None
    layer.requires_grad_(False)
    assert _frozen(site_for("0", layer)) is layer.weight
    layer.inside = nn.Linear(2, 2)  # as an adapter stands inside its layer
    assert _frozen(site_for("0", layer)) is layer.weight
    layer.bias.requires_grad_(True)
    assert _frozen(site_for("0", layer)) is None
    assert _frozen(site_for("0", nn.Embedding(4, 3).requires_grad_(False))) is None


def test_a_sum_is_written_in_place_and_takes_both_gradients_only_where_it_may(monkeypatch):
    asked = []
    real = fourier.added

    def added(*given, writable, frozen=None):
        asked.append((writable, frozen))
        return real(*given, writable=writable, frozen=frozen)

    monkeypatch.setattr(fourier, "added", added)
    layer = nn.Linear(8, 6).requires_grad_(False)
    site = site_for("0", layer)
    delta = methods.build(methods.get("fourierft"), site, {"frequencies": 5})
    x = torch.randn(3, 8)
    y = layer(x)
    torch.nn.init.normal_(delta.c)
    change = x @ delta.delta(site).mT
    torch.testing.assert_close(delta(x, y, site), change, rtol=1e-4, atol=1e-6)
    for writable in (False, True):
        summed = delta.onto(x, y.clone(), site, writable=writable)
        torch.testing.assert_close(summed, y + change, rtol=1e-4, atol=1e-6)
    assert asked == [(True, None), (False, None), (True, layer.weight)]


def test_a_grid_has_a_normal_form_on_rows():
    for layer in (nn.Linear(8, 6), nn.Conv1d(8, 6, 1), nn.Embedding(8, 6)):
        site = site_for("0", layer)
        for grid in (True, False):
            delta = methods.build(methods.get("fourierft"), site, {"frequencies": 5, "grid": grid})
            assert (delta.factors(site) is not None) == grid
            assert (delta.normal_form(site) is not None) == (grid and isinstance(layer, nn.Linear))


def test_waves_follow_the_frequencies_that_are_loaded():
    site = site_for("0", nn.Linear(8, 6).double())
    delta = methods.build(methods.get("fourierft"), site, {"frequencies": 4, "grid": True, "rms": 0.5})
    state = {**delta.state_dict(), "c": torch.randn(2, 2).double()}
    delta.load_state_dict({**state, "rows": torch.tensor([5, 0]), "columns": torch.tensor([1, 4])})
    F = torch.zeros(6, 8, dtype=torch.float64)
    F[5, 1], F[5, 4], F[0, 1], F[0, 4] = delta.c.detach().flatten()
    torch.testing.assert_close(delta.delta(site), torch.fft.ifft2(F).real * delta.scaling)
