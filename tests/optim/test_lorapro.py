"""LoRA-Pro against the paper written naively: the thirteen properties of its steps, on random matrices in
float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import lorapro as oracle
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.errors import ConfigError
from veneer.methods.lora import LoRA
from veneer.ops.matrix.grams import gram
from veneer.ops.matrix.tangent import adjust, point, squared_norm
from veneer.optim.base import groups
from veneer.optim.lorapro.factored import floored, sums

M, N, R, S = 37, 29, 5, 2.0
CHOICES = ["sylvester", "zero", "symmetric"]


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, n), B (m, r), G (m, n)."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((R, N), (M, R), (M, N))
    )


A, B, G = drawn()
GA, GB = S * B.T @ G, S * G @ A.T
PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
NEAREST = torch.from_numpy(oracle.projection(G.numpy(), A.numpy(), B.numpy()))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


def exact(x: str = "sylvester") -> tuple[Tensor, Tensor]:
    return adjust(point(A, B, S), GA, GB, x)


def product(dA: Tensor, dB: Tensor) -> Tensor:
    return S * (B @ dA + dB @ A)


# -- the thirteen properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("x", CHOICES)
def test_1_the_choice_of_x_drops_out_of_the_change_of_the_product(x):
    close(product(*exact(x)), NEAREST, 1e-12)
    dA, dB = exact("zero")
    X = 10 * torch.randn(R, R, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(product(dA + X @ A, dB - B @ X), NEAREST, 1e-12)


def test_2_it_is_the_dense_least_squares_projection():
    fit, rank = oracle.least_squares(G.numpy(), A.numpy(), B.numpy(), S)
    close(product(*exact()), torch.from_numpy(fit), 1e-10)
    assert rank == R * (M + N - R)
    left = G - product(*exact())
    assert (B.T @ left).abs().max() < 1e-11 and (left @ A.T).abs().max() < 1e-11


def test_3_the_norm_of_the_projection_is_free_and_the_descent():
    square = NEAREST.square().sum()
    for found in (squared_norm(point(A, B, S).inverses, B.T @ GB, GA @ GA.T, GB.T @ GB), (G * NEAREST).sum()):
        assert float(found) == pytest.approx(float(square), rel=1e-12)
    dA, dB = exact("zero")
    assert float((GA * dA).sum() + (GB * dB).sum()) == pytest.approx(float(square), rel=1e-12)
    assert float((GA * dA).sum()) > 0 and float((GB * dB).sum()) > 0


def test_4_sylvesters_x_is_the_papers():
    dA, dB = exact()
    for found, expected in zip(
        (dA, dB), oracle.paper(GA.numpy(), GB.numpy(), A.numpy(), B.numpy(), S), strict=True
    ):
        close(found, torch.from_numpy(expected), 1e-11)
    at = point(A, B, S)
    C = -at.inverses.of_b @ GA @ A.T / S**2
    X = (dA - exact("zero")[0]) @ torch.linalg.pinv(A)
    close(B.T @ B @ X + X @ A @ A.T, C, 1e-11)
    slope = 2 * (dA - GA) @ A.T - 2 * B.T @ (dB - GB)  # of |dA - gA|^2 + |dB - gB|^2 in X
    assert slope.norm() <= 1e-12 * ((dA - GA).square().sum() + (dB - GB).square().sum())
    noisy = GB + torch.randn_like(GB)  # of no G that GA is of, as after roundings
    other = adjust(at, GA, noisy, "sylvester")
    close(other[0], dA, 1e-13)  # gB has no part in X
    close(
        other[1], torch.from_numpy(oracle.paper(GA.numpy(), noisy.numpy(), A.numpy(), B.numpy(), S)[1]), 1e-11
    )
    close(B.T @ GB, GA @ A.T, 1e-13)


def test_5_the_symmetric_x_gives_each_factor_half_of_what_both_could_do():
    dA, dB = exact("symmetric")
    close(PB @ (B @ dA) @ PA, PB @ (dB @ A) @ PA, 1e-11)
    at = point(A, B, S)
    zero = exact("zero")
    X = (
        -(at.inverses.of_b @ GA @ A.T / S**2) @ (A @ A.T) / 2
    )  # the authors' older code has A A' for its inverse
    dA, dB = zero[0] + X @ A, zero[1] - B @ X
    close(product(dA, dB), NEAREST, 1e-11)
    assert (PB @ (B @ dA - dB @ A) @ PA).norm() > 0.5 * (PB @ (B @ dA) @ PA).norm()


def test_7_a_finite_step_differs_in_the_square_of_the_rate_alone():
    h = 1e-2
    for x in CHOICES:
        dA, dB = exact(x)
        moved = S * (B - h * dB) @ (A - h * dA)
        close(moved, S * B @ A - h * NEAREST + S * h * h * dB @ dA, 1e-13)
        found = step([(A, B)], lambda W: G, [h], form="sgd", x=x, damping=0.0)[0]
        close(S * found[1] @ found[0], moved, 1e-13)


def test_8_at_b_zero_the_first_step_is_of_b_alone():
    zero = torch.zeros_like(B)
    for x in CHOICES:
        dA, dB = adjust(point(A, zero, S), torch.zeros_like(GA), GB, x)
        assert not dA.any()
        close(S * dB @ A, G @ PA, 1e-12)


def second_step(rate: float, damping: float) -> float:
    """Returns the second step of A over the length of A, from B = 0 along random signs."""
    draw = torch.Generator().manual_seed(3)
    start = (2 * torch.rand(R, N, generator=draw, dtype=torch.float64) - 1) / math.sqrt(N)
    signs = [torch.randn(M, N, generator=draw, dtype=torch.float64).sign() for _ in range(2)]
    B1 = -rate * signs[0] @ torch.linalg.pinv(start) / S
    dA, _ = adjust(point(start, B1, S, damping), S * B1.T @ signs[1], S * signs[1] @ start.T)
    return float(rate * dA.norm() / start.norm())


def test_9_damping_bounds_the_second_step_by_the_rate():
    rates = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
    assert all(0.5 < second_step(rate, 0.0) < 1.5 for rate in rates)  # of any rate
    assert all(second_step(rate, 1e-2) < 60 * rate for rate in rates)


@pytest.mark.parametrize("form", ["full", "factored", "sgd"])
def test_9_the_first_two_steps_of_every_form_are_bounded_by_the_rate(form):
    draw = torch.Generator().manual_seed(4)
    start = (2 * torch.rand(R, N, generator=draw, dtype=torch.float64) - 1) / math.sqrt(N)
    signs = iter([torch.randn(M, N, generator=draw, dtype=torch.float64).sign() for _ in range(8)])
    for rate in (1e-2, 1e-3, 1e-4, 1e-5):
        (found, moved), *_ = step(
            [(start, torch.zeros_like(B))], lambda W: next(signs), [rate, rate], form=form
        )
        assert (found - start).norm() < 60 * rate * start.norm()
        assert (moved @ found).norm() < 4 * rate * math.sqrt(M * N)


def test_10_the_first_direction_is_that_of_signs_and_the_scaling_is_the_modules():
    for s in (0.5, 2.0, 7.0):
        found = step([(A, B)], lambda W: G, [1e-3], s=s, form="full", damping=0.0)[0]
        E = torch.from_numpy(oracle.projection(G.numpy(), A.numpy(), B.numpy()))
        g = E.sign().numpy()
        dA, dB = oracle.paper(s * B.T.numpy() @ g, s * g @ A.T.numpy(), A.numpy(), B.numpy(), s)
        close(found[0] - A, torch.from_numpy(-1e-3 * dA), 1e-5)
        close(found[1] - B, torch.from_numpy(-1e-3 * dB), 1e-5)


@pytest.mark.parametrize("form", ["full", "factored", "sgd"])
def test_11_without_a_gradient_the_product_decays_as_a_whole(form):
    found = step([(A, B)], lambda W: torch.zeros_like(G), [0.03], decay=0.2, form=form)[0]
    close(found[1] @ found[0], (1 - 0.03 * 0.2) * B @ A, 1e-14)


def test_12_sums_and_directions_from_factors_are_the_dense_ones():
    dA, dB = exact("zero")
    row, col = sums(torch.cat([B, dB], 1), torch.cat([dA, A]), S)
    close(row[:, 0], NEAREST.square().sum(1), 1e-12)
    close(col[0], NEAREST.square().sum(0), 1e-12)
    rates, gradients = [0.05, 0.02, 0.03], [lambda W, k=k: drawn(k)[2].numpy() + W for k in (5, 6, 7)]
    for n in (1, 3):  # the first step, and the mean carried twice
        expected = oracle.factored(A.numpy(), B.numpy(), gradients[:n], S, rates[:n])
        found = step([(A, B)], in_turn(gradients), rates[:n], form="factored", damping=0.0)[0]
        for a, b in zip(found, expected, strict=True):
            close(a, torch.from_numpy(b), 1e-10)


def test_12_the_published_form_is_the_papers_algorithm():
    rates, gradients = [0.05, 0.02, 0.03], [lambda W, k=k: drawn(k)[2].numpy() + W for k in (5, 6, 7)]
    expected = oracle.published(A.numpy(), B.numpy(), gradients, S, rates)
    found = step([(A, B)], in_turn(gradients), rates, form="full", damping=0.0)[0]
    for a, b in zip(found, expected, strict=True):
        close(a, torch.from_numpy(b), 1e-9)


def test_13_state_sizes_of_a_llama_2_7b():
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    for r, factors in ((8, 0.15), (32, 0.60), (128, 2.38)):
        parts = []
        for m, n in shapes * 32:
            owner = owner_of(S)
            parts.append(groups.Part("x.A", nn.Parameter(torch.empty(r, n, device="meta")), "A", owner=owner))
            parts.append(groups.Part("x.B", nn.Parameter(torch.empty(m, r, device="meta")), "B", owner=owner))
        full, factored, adamw = (size(parts, **o) for o in ({"form": "full"}, {"form": "factored"}, {}))
        assert full == pytest.approx(48.25, abs=0.01)
        # AdamW keeps two numbers for each, the factored form one, and sums of rows and columns
        assert adamw == pytest.approx(factors, abs=0.006) and factored == pytest.approx(
            factors / 2 * (r + 1) / r, rel=0.03
        )
    parts = parts[:2]
    told = optim.make("lorapro", form="full").announcement(optim.Trained(parts))
    assert (
        told == "LoRA-Pro's full form keeps two matrices of every layer's size: 134 MB; form"
        " factored keeps 4.36 MB"
    )
    assert optim.make("lorapro").announcement(optim.Trained(parts)) is None


def size(parts: list[groups.Part], **options: str) -> float:
    """GiB of state, of AdamW without options."""
    rule = optim.make("lorapro", **options) if options else optim.make("adamw")
    return rule.state_bytes(optim.Trained(parts)) / 2**30


# -- one step after another ----------------------------------------------------------------------------------


def owner_of(s: float) -> LoRA:
    """A change that is nothing but its scaling."""
    owner = LoRA.__new__(LoRA)
    nn.Module.__init__(owner)
    owner.scaling = s
    return owner


def step(starts, gradient, rates, *, s=S, decay=0.0, **options) -> list[tuple[Tensor, Tensor]]:
    """The factors after steps of LoRA-Pro with these options; gradient: of s B A (m, n), in its own size."""
    factors = [(nn.Parameter(a.clone()), nn.Parameter(b.clone())) for a, b in starts]
    parts = []
    for i, (a, b) in enumerate(factors):
        owner = owner_of(s)
        parts += [groups.Part(f"{i}.A", a, "A", owner=owner), groups.Part(f"{i}.B", b, "B", owner=owner)]
    optimiser = optim.make("lorapro", **options).build(optim.Trained(parts))
    for rate in rates:
        for a, b in factors:
            D = gradient((s * b @ a).detach())
            a.grad, b.grad = s * b.detach().T @ D, s * D @ a.detach().T
        groups.set_rates(optimiser, rate, decay)
        optimiser.step()
    return [(a.detach(), b.detach()) for a, b in factors]


def in_turn(gradients):
    """A gradient that is another function of s B A, on arrays, at every call."""
    each = iter(gradients)
    return lambda W: torch.from_numpy(next(each)(W.numpy()))


def test_layers_of_a_shape_are_stepped_as_if_each_were_alone():
    starts = [drawn(k)[:2] for k in (0, 1, 2)]
    each = [drawn(k)[2] for k in (3, 4, 5)]
    for form in ("full", "factored", "sgd"):
        together = step(starts, in_turn([lambda W, D=D: D.numpy() for D in each]), [0.01], form=form)
        for i, start in enumerate(starts):
            alone = step([start], lambda W, i=i: each[i], [0.01], form=form)[0]
            for a, b in zip(together[i], alone, strict=True):
                close(a, b, 1e-12)


def test_in_float32_it_is_the_paper_to_the_precision_of_float32():
    dA, dB = adjust(point(A.float(), B.float(), S), GA.float(), GB.float())
    expected = oracle.paper(GA.numpy(), GB.numpy(), A.numpy(), B.numpy(), S)
    for found, wanted in zip((dA, dB), expected, strict=True):
        close(found.double(), torch.from_numpy(wanted), 1e-5)


def test_factors_of_a_smaller_rank_have_a_pseudo_inverse():
    narrow = B.clone()
    narrow[:, 3:] = narrow[:, :2]
    dA, dB = adjust(point(A, narrow, S), S * narrow.T @ G, GB, "zero")
    close(
        S * (narrow @ dA + dB @ A),
        torch.from_numpy(oracle.projection(G.numpy(), A.numpy(), narrow.numpy())),
        1e-9,
    )
    assert np.linalg.matrix_rank(gram(narrow.T @ narrow).power(-1).numpy()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "ful"}, "unknown form 'ful'; did you mean 'full'?"),
        ({"x": "sylvestre"}, "unknown x 'sylvestre'; did you mean 'sylvester'?"),
        ({"damping": -1.0}, "damping must be >= 0, got -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError) as e:
        optim.make("lorapro", **options)
    assert str(e.value) == message


def test_second_moments_end_a_millionth_below_their_mean():
    rows = torch.tensor([[[3.0], [3e-6], [1.4e-6], [0.0]], [[1.0], [1.0], [1.0], [1.0]]], dtype=torch.float64)
    bounded = floored(rows)
    mean = (3 + 3e-6 + 1.4e-6) / 4
    expected = torch.tensor([3.0, 3e-6, 1.4e-6, 1e-6 * mean], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        bounded, torch.stack([expected, torch.ones_like(expected)]), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(floored(rows.mT), bounded.mT, rtol=0, atol=0)


def test_sums_of_nothing_are_those_of_epsilons():
    left, right = torch.zeros(3, 5, 2, dtype=torch.float64), torch.zeros(3, 2, 7, dtype=torch.float64)
    row, col = sums(left, right, 2.0)
    torch.testing.assert_close(row, torch.full_like(row, 7e-16), rtol=1e-12, atol=0)
    torch.testing.assert_close(col, torch.full_like(col, 5e-16), rtol=1e-12, atol=0)
    assert row.shape == (3, 5, 1) and col.shape == (3, 1, 7)


def test_state_is_dealt_among_processes_by_the_size_of_the_layers():
    sizes = [(64, 8), (48, 8), (8, 64), (8, 48)]  # (out, in)
    model = nn.Sequential(*(nn.Linear(n, m) for m, n in sizes))
    veneer.attach(model, "lora", rank=2, to=["0", "1", "2", "3"])
    trained = optim.Trained(groups.of_adapter(model, "default"))
    most = 4 * (2 * (512 + 384) + 2)  # bytes: two numbers an entry and a count a layer
    assert optim.make("lorapro", form="full").state_bytes(trained, 2) == most
    assert optim.make("lorapro", form="full").state_bytes(trained, 3) == 4 * (
        2 * 2 * 384 + 2
    )  # 512, 512, 768
