"""Every optimiser finds its pairs by role, learns, resumes bit for bit, and accumulates micro-batches
exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import models
from support.objectives import causal_lm
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.adapt.attached import changes
from veneer.data import pack
from veneer.data.tokens import Tokens
from veneer.errors import ConfigError, NotFinite
from veneer.methods import DenseDelta
from veneer.methods.lora import LoRA
from veneer.ops.matrix.grams import gram
from veneer.optim.balanced import over, product_norm
from veneer.optim.base import groups, pairs
from veneer.tasks.text import next_token
from veneer.train.folder import checkpoint
from veneer.train.loop import state
from veneer.train.loop.step import Learner


class Rule(NamedTuple):
    """An optimiser with options, a rate at which a tiny model learns in a few steps, and whether it minds how
    B A is split."""

    name: str
    options: dict[str, Any]
    rate: float
    gauge_free: bool


RULES = {
    "adamw": Rule("adamw", {}, 2e-2, False),
    "loraplus": Rule("loraplus", {"ratio": 4.0}, 1e-2, False),
    "scaled": Rule("scaled", {"damping": 0.0}, 2e-2, False),
    "balanced": Rule("balanced", {}, 1e-2, False),
    "lora-muon": Rule("lora-muon", {"damping": 0.0}, 1e-2, True),
    "lorapro full": Rule("lorapro", {"form": "full", "damping": 0.0}, 1e-2, True),
    "lorapro factored": Rule("lorapro", {"form": "factored", "damping": 0.0}, 1e-2, True),
    "lorapro sgd": Rule("lorapro", {"form": "sgd", "damping": 0.0}, 0.3, True),
}
PAIRED = [name for name, rule in RULES.items() if rule.name not in ("adamw", "loraplus")]


def rule(name: str, damped: bool = True) -> optim.Optimiser:
    options = {k: v for k, v in RULES[name].options.items() if not (damped and k == "damping")}
    return optim.make(RULES[name].name, **options)


def learner(
    name: str, method: str = "lora", dtype: torch.dtype = torch.float32, decay: float = 0.1, **options: Any
) -> Learner:
    """A tiny Llama with adapters, and the optimiser with its own damping."""
    model = veneer.attach(
        models.llama().to(dtype), method, **{"rank": 2, "to": ["q_proj", "down_proj"], **options}
    )
    parts = groups.of_adapter(model, "default")
    optimiser = rule(name).build(optim.Trained(parts))
    return Learner(model, parts, optimiser, causal_lm(), next_token.loss, 1.0, decay)


def windows(n: int, length: int = 12) -> list[pack.Window]:
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(models.VOCABULARY, (length,), generator=draw) for _ in range(n)]
    return [
        tuple(pack.segments(Tokens(ids, torch.ones(length, dtype=torch.bool), torch.ones(length)), length))
        for ids in rows
    ]


def trained(made: Learner) -> list[Tensor]:
    return [p.parameter.detach().clone() for p in made.parts]


def test_every_optimiser_is_tested_here():
    assert {r.name for r in RULES.values()} == set(optim.available()) - {
        "galore"
    }  # steps weights, not factors: test_scratch.py


# -- pairs ---------------------------------------------------------------------------------------------------


def test_pairs_are_found_by_role_with_the_scaling_of_their_module():
    model = veneer.attach(
        models.llama(),
        "dora",
        rank=4,
        alpha=6.0,
        rank_pattern={"q_proj": 2},
        stabilised=True,
        to=["q_proj", "k_proj"],
    )
    found, others = pairs.of(groups.of_adapter(model, "default"))
    assert {p.where for p in found} == {
        f"model.layers.{i}.self_attn.{k}_proj.lora" for i in (0, 1) for k in "qk"
    }
    for p, (_, delta) in zip(found, changes(model, "default"), strict=True):
        assert (
            p.A is delta.lora.A
            and p.B is delta.lora.B
            and p.scaling == delta.lora.scaling == 6.0 / math.sqrt(p.shape[2])
        )
    assert {p.role for p in others} == {"magnitude"} and len(others) == 4
    assert [[p.shape for p in bucket] for bucket in pairs.by_shape(found)] == [
        [(32, 32, 2)] * 2,
        [(16, 32, 4)] * 2,
    ]


def test_the_order_of_what_is_trained_does_not_matter():
    parts = groups.of_adapter(veneer.attach(models.llama(), rank=2), "default")
    assert {(p.where, id(p.A), id(p.B)) for p in pairs.of(parts)[0]} == {
        (p.where, id(p.A), id(p.B)) for p in pairs.of(parts[::-1])[0]
    }


class OneSided(DenseDelta):
    """A change with a factor in the role B and none in the role A."""

    roles = {"B": "B"}

    def __init__(self, site, *, rank: int = 2):
        super().__init__()
        self.B = nn.Parameter(torch.zeros(site.out, rank))

    def delta(self, site):
        return self.B @ torch.ones(self.B.shape[1], site.in_)


@pytest.mark.parametrize("name", PAIRED)
def test_what_has_no_pairs_is_refused_by_name(name):
    parts = groups.of_adapter(veneer.attach(models.llama(), OneSided, to=["q_proj"]), "default")
    with pytest.raises(ConfigError) as e:
        rule(name).build(optim.Trained(parts))
    where = "model.layers.0.self_attn.q_proj.B, model.layers.1.self_attn.q_proj.B"
    assert str(e.value) == (
        f"this optimiser needs one A (r, in) and one B (out, r) per layer, which {where} lack;"
        " use optimiser 'adamw'"
    )
    with pytest.raises(
        ConfigError, match=r"needs trained pairs A \(r, in\), B \(out, r\), got none; use optimiser"
    ):
        rule(name).build(optim.Trained(groups.of_base(models.llama())))


@pytest.mark.parametrize("name", PAIRED)
def test_numbers_that_are_not_finite_are_reported_with_the_layer(name):
    made = learner(name, to=["q_proj"])
    with torch.no_grad():
        made.parts[2].parameter[0, 0] = 1e30  # its square is not finite in float32
    for p in made.parts:
        p.parameter.grad = torch.ones_like(p.parameter)
    before = trained(made)
    with pytest.raises(NotFinite) as e:
        made.optimiser.step()
    told = (
        "A A' or B'B is not finite at model.layers.1.self_attn.q_proj; resume from a checkpoint"
        " with a lower lr"
    )
    assert str(e.value) == told and all(torch.equal(a, b) for a, b in zip(before, trained(made), strict=True))


# -- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("name", RULES)
def test_it_lowers_the_loss_on_any_method_with_factors(name, method):
    init = {"init": "pissa"} if method == "pissa" else {}
    made = learner(name, "dora" if method == "dora" else "lora", decay=0.0, **init)
    batch = windows(4)
    losses = [made.step([batch], RULES[name].rate).loss for _ in range(10)]
    assert losses[-1] < 0.97 * losses[0] and all(math.isfinite(x) for x in losses)


@pytest.mark.parametrize("name", PAIRED)
def test_embeddings_and_convolutions_are_pairs_too(name):
    for model, to in (
        (models.llama(), ["embed_tokens", "q_proj"]),
        (models.conv_net(), ["first", "second", "line", "head"]),
    ):
        parts = groups.of_adapter(veneer.attach(model, rank=2, to=to), "default")
        optimiser = rule(name).build(optim.Trained(parts, embedding=0.5))
        before = models.output(model)
        for _ in range(2):  # A stands still in the first step, where B is 0 (of an embedding, B where A is 0)
            optimiser.zero_grad()
            y = model(**models.inputs(model))
            (y if isinstance(y, Tensor) else y.logits).square().sum().backward()
            start = {p.name: p.parameter.detach().clone() for p in parts}
            groups.set_rates(optimiser, RULES[name].rate / 100, 0.0)
            optimiser.step()
        assert all((p.parameter != start[p.name]).any() for p in parts)
        assert models.output(model).isfinite().all() and (models.output(model) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", RULES)
def test_micro_batches_are_one_batch(name):
    batch, found = windows(4), []
    for micro in ([batch], [batch[:1], batch[1:3], batch[3:]]):
        made = learner(name, dtype=torch.float64)
        found.append([made.step(micro, 1e-3).norm for _ in range(3)] + trained(made))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_going_on_from_a_checkpoint_is_bit_for_bit(name, tmp_path):
    batch = windows(4)
    whole = learner(name, "dora")
    for _ in range(4):
        whole.step([batch], RULES[name].rate)
    first = learner(name, "dora")
    for _ in range(2):
        first.step([batch], RULES[name].rate)
    checkpoint.save(tmp_path, 2, state.tensors(first), {})
    again = learner(name, "dora")
    state.restore(again, checkpoint.load(tmp_path / "step-000002"))
    for _ in range(2):
        again.step([batch], RULES[name].rate)
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(whole), trained(first), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_state_is_as_large_as_it_says_and_in_float32_on_a_bf16_base(name):
    made = learner(name, "dora", torch.bfloat16)
    made.step([windows(2)], 1e-3)
    made.step([windows(2)], 1e-3)
    held = [t for s in made.optimiser.state.values() for t in s.values()]
    assert {t.dtype for t in held} <= {torch.float32}
    assert sum(t.numel() * t.element_size() for t in held) == rule(name).state_bytes(
        optim.Trained(made.parts)
    )


def test_second_moments_decay_where_gradients_are_bf16():
    from veneer.optim.base.moments import direction

    held: dict[str, Tensor] = {}
    direction(held, torch.ones(3, dtype=torch.bfloat16), (0.9, 0.999))
    first = held["exp_avg_sq"].clone()
    for _ in range(2000):
        direction(held, torch.zeros(3, dtype=torch.bfloat16), (0.9, 0.999))
    torch.testing.assert_close(held["exp_avg_sq"] / first, torch.full((3,), 0.999**2000), rtol=1e-3, atol=0)
    stuck = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(2000):
        stuck.mul_(0.999)
    assert stuck.eq(1).all()  # what the published code's moments do


@pytest.mark.parametrize("name", RULES)
def test_the_product_decays_as_a_whole(name):
    made = learner(name, dtype=torch.float64)
    models.randomise(made.model)
    products = [d.B.detach() @ d.A.detach() for _, d in changes(made.model, "default")]
    for p in made.parts:
        p.parameter.grad = torch.zeros_like(p.parameter)
    groups.set_rates(made.optimiser, 0.03, 0.2)
    made.optimiser.step()
    for before, (_, d) in zip(products, changes(made.model, "default"), strict=True):
        torch.testing.assert_close((d.B @ d.A).detach(), (1 - 0.03 * 0.2) * before, rtol=1e-12, atol=0)


# -- one pair ------------------------------------------------------------------------------------------------

M, N, R, S = 24, 18, 3, 1.5


def alone(
    name: str, A: Tensor, B: Tensor, gradients: list[Callable[[Tensor], Tensor]], rate: float, damped: bool
) -> tuple[Tensor, Tensor]:
    """A and B after a step for each gradient, a function of s B A."""
    owner = LoRA.__new__(LoRA)
    nn.Module.__init__(owner)
    owner.scaling = S
    a, b = nn.Parameter(A.clone()), nn.Parameter(B.clone())
    found = [groups.Part("site.A", a, "A", owner=owner), groups.Part("site.B", b, "B", owner=owner)]
    optimiser = rule(name, damped).build(optim.Trained(found))
    for gradient in gradients:
        G = gradient((S * b @ a).detach())
        a.grad, b.grad = S * b.detach().T @ G, S * G @ a.detach().T
        groups.set_rates(optimiser, rate, 0.0)
        optimiser.step()
    return a.detach(), b.detach()


def numbers(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", RULES)
def test_only_some_steps_do_not_depend_on_how_the_product_is_split(name):
    A, B, G, R_ = numbers((R, N), (M, R), (M, N), (R, R))
    R_ = R_ + 3 * torch.eye(R, dtype=torch.float64)
    rate, found = 1e-6, []
    for a, b in ((A, B), (torch.linalg.solve(R_, A), B @ R_)):
        a1, b1 = alone(name, a, b, [lambda W: G], rate, damped=False)
        found.append((b @ (a1 - a) + (b1 - b) @ a) / rate)  # to first order
    apart = float((found[0] - found[1]).norm() / found[0].norm())
    assert apart < 1e-7 if RULES[name].gauge_free else apart > 0.05


def test_scaled_gradients_count_what_both_factors_can_do_twice():
    A, B, G = numbers((R, N), (M, R), (M, N))
    gA, gB = S * B.T @ G, S * G @ A.T
    found = B @ gram(B.T @ B).power(-1) @ gA + gB @ gram(A @ A.T).power(-1) @ A
    expected = S * (B @ torch.linalg.pinv(B) @ G + G @ torch.linalg.pinv(A) @ A)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_powers_of_grams_solve_the_balance_of_the_factors():
    A, B = numbers((R, N), (M, R))
    P, Q = A @ A.T, B.T @ B
    H = gram(P).power(0.5)
    Z = gram(P).power(-0.5) @ gram(H @ Q @ H).power(0.5) @ gram(P).power(-0.5)  # RefLoRA's geometric mean
    torch.testing.assert_close(Z @ P @ Z, Q, rtol=1e-10, atol=1e-10)


def test_undamped_muon_moves_the_product_equally_far_by_both_factors():
    A, B, G = numbers((R, N), (M, R), (M, N))
    a, b = alone("lora-muon", A, B, [lambda W: G], 1e-3, damped=False)
    t = 1e-3 * math.sqrt(max(M, N)) / S
    for change in (B @ (a - A), (b - B) @ A):
        values = torch.linalg.svdvals(change)
        torch.testing.assert_close(
            values[:R], torch.full((R,), t / 2, dtype=torch.float64), rtol=1e-8, atol=0
        )


def test_damped_muon_adds_a_share_of_both_grams_to_each():
    A, B, G = numbers((R, N), (M, R), (M, N))
    a, b = alone("lora-muon", A, B, [lambda W: G], 1e-3, damped=True)
    d = 0.05 * (A.square().sum() + B.square().sum()) / R

    def root(rows: Tensor) -> Tensor:
        """(rows rows' + d)^-1/2."""
        U, sizes, _ = torch.linalg.svd(rows, full_matrices=False)
        return U @ torch.diag((sizes**2 + d) ** -0.5) @ U.T

    def msign(H: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(H, full_matrices=False)
        return U @ Vh

    RA, RB, t = root(A), root(B.T), 1e-3 * math.sqrt(max(M, N)) / (2 * S)
    torch.testing.assert_close(A - a, t * RB @ msign(RB @ B.T @ G), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(B - b, t * msign(G @ A.T @ RA) @ RA, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["scaled", "balanced", "lora-muon"])
def test_moments_follow_the_papers_over_several_steps(name):
    """Gradients that differ from step to step tell the two decay rates and the count of steps apart."""
    A, B, *Gs = numbers((R, N), (M, R), *[(M, N)] * 4)
    rate, moments = 1e-2, {"A": [0.0, 0.0], "B": [0.0, 0.0]}
    found = alone(name, A, B, [lambda W, G=G: G for G in Gs], rate, damped=True)

    def adam(side: str, g: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """The corrected mean, and Adam's direction."""
        m, v = moments[side] = [0.9 * moments[side][0] + 0.1 * g, 0.999 * moments[side][1] + 0.001 * g**2]
        m, v = m / (1 - 0.9**t), v / (1 - 0.999**t)
        return m, m / (v.sqrt() + 1e-8)

    def root(K: Tensor, power: float) -> Tensor:
        sizes, U = torch.linalg.eigh(K)
        return U @ torch.diag(sizes**power) @ U.T

    def msign(H: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(H, full_matrices=False)
        return U @ Vh

    for t, G in enumerate(Gs, 1):
        gA, gB = S * B.T @ G, S * G @ A.T
        damp = 0.05 * (A.square().sum() + B.square().sum()) / R * torch.eye(R, dtype=torch.float64)
        P, Q = A @ A.T + damp, B.T @ B + damp
        if name == "scaled":
            dA, dB = adam("A", root(Q, -1) @ gA, t)[1], adam("B", gB @ root(P, -1), t)[1]
        elif name == "balanced":
            uA, uB = adam("A", gA, t)[1], adam("B", gB, t)[1]
            a, b, reach = (B @ uA).norm(), (uB @ A).norm(), math.sqrt(M * N) / (2 * S)
            dA, dB = reach * uA / (a + 0.1 * b), reach * uB / (b + 0.1 * a)
        else:
            RA, RB, reach = root(P, -0.5), root(Q, -0.5), math.sqrt(max(M, N)) / (2 * S)
            dA = reach * RB @ msign(RB @ adam("A", gA, t)[0])
            dB = reach * msign(adam("B", gB, t)[0] @ RA) @ RA
        A, B = A - rate * dA, B - rate * dB
    torch.testing.assert_close(found[0], A, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found[1], B, rtol=1e-7, atol=1e-10)


def test_balanced_steps_move_the_product_as_far_as_the_rate_says():
    A, B, G = numbers((R, N), (M, R), (M, N))
    a, b = alone("balanced", A, B, [lambda W: G], 1e-3, damped=False)
    uA, uB = (S * B.T @ G).sign(), (S * G @ A.T).sign()
    reach, other = (B @ uA).norm(), (uB @ A).norm()
    t = 1e-3 * math.sqrt(M * N) / (2 * S)
    torch.testing.assert_close(A - a, t * uA / (reach + 0.1 * other), rtol=1e-5, atol=0)
    torch.testing.assert_close(B - b, t * uB / (other + 0.1 * reach), rtol=1e-5, atol=0)


def test_a_balanced_step_that_would_move_nothing_is_none():
    """Where A and B are both zero no step of either moves B A, and the rule gives no length."""
    A, B = torch.zeros(R, N, dtype=torch.float64), torch.zeros(M, R, dtype=torch.float64)
    u, length = torch.ones(2, R, N), torch.tensor([[[0.0]], [[4.0]]])
    assert torch.equal(over(u, length), torch.stack([torch.zeros(R, N), torch.full((R, N), 0.25)]))
    assert float(product_norm(B.T @ B, A @ A.T)) == 0
    below = torch.full((1, 1), -1e-9)  # of rounding: a sum of squares is never negative otherwise
    assert float(product_norm(below, torch.ones(1, 1))) == 0


@pytest.mark.parametrize(
    ("floor", "fits"), [(-0.5, False), (0.0, False), (0.01, True), (1.0, True), (1.5, False)]
)
def test_the_floor_of_balanced_steps_is_a_share(floor, fits):
    if fits:
        assert optim.make("balanced", floor=floor).floor == floor
    else:
        with pytest.raises(ConfigError, match=r"floor must be in \(0, 1\], got"):
            optim.make("balanced", floor=floor)


def test_scaled_adamw_is_adamw_on_scaled_gradients():
    A, B, G = numbers((R, N), (M, R), (M, N))
    a, b = alone("scaled", A, B, [lambda W: G], 1e-3, damped=True)
    shift = 0.05 * (torch.trace(A @ A.T) + torch.trace(B.T @ B)) / R * torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(
        A - a, 1e-3 * torch.linalg.solve(B.T @ B + shift, S * B.T @ G).sign(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        B - b, 1e-3 * (S * G @ A.T @ torch.linalg.inv(A @ A.T + shift)).sign(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", RULES)
def test_the_first_two_steps_from_b_zero_are_bounded_by_the_rate(name):
    (A,) = numbers((R, N))
    A = A.clamp(-1, 1) / math.sqrt(N)
    signs = [g.sign() for g in numbers((M, N), (M, N), seed=1)]
    reached = []
    for rate in (1e-3, 1e-4, 1e-5):
        a, b = alone(
            name,
            A,
            torch.zeros(M, R, dtype=torch.float64),
            [lambda W: signs[0], lambda W: signs[1]],
            rate,
            damped=True,
        )
        reached.append((float((a - A).norm() / A.norm() / rate), float((S * b @ a).norm() / rate)))
    assert all(x < 200 and y < 1500 for x, y in reached)
    assert reached[2][0] < 3 * reached[0][0] and reached[2][1] < 3 * reached[0][1]


def test_embeddings_have_a_rate_of_their_own():
    parts = groups.of_adapter(
        veneer.attach(models.llama(), "dora", rank=2, to=["embed_tokens", "q_proj"]), "default"
    )
    for name in PAIRED:
        optimiser = rule(name).build(optim.Trained(parts, embedding=0.25))
        groups.set_rates(optimiser, 2e-3, 0.0)
        rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
        assert {p.name: rates[id(p.parameter)] for p in parts} == {
            p.name: 5e-4 if "embed" in p.name else 2e-3 for p in parts
        }


@pytest.mark.parametrize("method", ["lora", "dora"])  # DoRA's m is outside the pairs
def test_lorapro_clips_by_the_norm_of_the_projected_gradient(method):
    made = learner("lorapro sgd", method, dtype=torch.float64)
    models.randomise(made.model)
    loss, n = next_token.loss(made.model.train(), made.batch(windows(2), torch.device("cpu")))
    (loss / n).backward()
    square = sum(float(p.parameter.grad.square().sum()) for p in made.parts if p.role not in "AB")
    for d in (m for _, change in changes(made.model, "default") for m in change.modules() if hasattr(m, "A")):
        A, B, s = d.A.detach(), d.B.detach(), d.scaling
        G = torch.linalg.pinv(s * B).T @ d.A.grad  # what the factors' gradients tell of the whole one
        G = G + (d.B.grad / s - G @ A.T) @ torch.linalg.pinv(A).T
        square += float(G.square().sum())
    parameters = [p.parameter for p in made.parts]
    made.optimiser.damping = 0.0
    norms = [
        float(made.optimiser.clip(parameters, most)) for most in (math.inf, 0.1 * math.sqrt(square), math.inf)
    ]
    assert norms == pytest.approx([math.sqrt(square), math.sqrt(square), 0.1 * math.sqrt(square)], rel=1e-4)
    assert made.step([windows(2)], 0.0).norm == pytest.approx(math.sqrt(square), rel=1e-9)


@pytest.mark.parametrize("lost", ["A", "B", "AB"])
@pytest.mark.parametrize("name", PAIRED)
def test_a_pair_without_one_of_its_gradients_stays_and_the_others_move(name: str, lost: str) -> None:
    made = learner(name)
    models.randomise(made.model)
    before = trained(made)
    for p in made.parts:
        p.parameter.grad = torch.ones_like(p.parameter)
    still = made.parts[0].owner
    for p in made.parts:
        if p.owner is still and p.role in lost:
            p.parameter.grad = None
    groups.set_rates(made.optimiser, 1e-2, 0.1)
    made.optimiser.step()
    moved = [not torch.equal(p.parameter, was) for p, was in zip(made.parts, before, strict=True)]
    assert moved == [p.owner is not still for p in made.parts]


@pytest.mark.parametrize("name", RULES)
def test_rates_are_looked_up_by_the_optimisers_own_name(name: str) -> None:
    assert rule(name).rated_as == {"lorapro sgd": "lorapro-sgd"}.get(name, RULES[name].name)


@pytest.mark.parametrize("name", PAIRED)
def test_plain_descent_takes_pairs_of_one_rank_together_and_others_those_of_one_shape(name: str) -> None:
    made = learner(name)
    found = [g for g in made.optimiser.param_groups if g["where"]]
    assert len(found) == (1 if name == "lorapro sgd" else 2)  # of q_proj and down_proj
