"""Starts that look at the loss, and the pass over a few batches that tells them: against dense gradients in
float64."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import starts
from safetensors.torch import load_file
from support import gloo_child, models, tiny
from torch import Tensor, nn

import veneer
from veneer.adapt.attached import changes
from veneer.errors import ConfigError, DataError, ShapeError, SiteError
from veneer.methods import Stats, inits
from veneer.ops.draws import keyed
from veneer.ops.matrix import sketch
from veneer.ops.matrix.sketch import Svd
from veneer.runs.fit import fit
from veneer.runs.starts import calibration
from veneer.train import rates
from veneer.train.errors import Interrupted
from veneer.train.loop.step import Learner
from veneer.train.run import Run

BUILDS = {"llama": models.llama, "gpt2": models.gpt2, "bert": models.bert, "conv": models.conv_net}


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y = model(**batch)
    return (y if isinstance(y, Tensor) else y.logits).double().square().sum()


def some(model: nn.Module, n: int = 3) -> list[dict[str, Tensor]]:
    found = [models.inputs(model, seed) for seed in range(n)]
    dtype = next(model.parameters()).dtype
    return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in found]


def dense(model: nn.Module, batches: list[Any], names: list[str]) -> dict[str, np.ndarray]:
    """The gradient (out, in) of the summed loss in every layer's own weight, without a change that hangs on
    it."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.requires_grad_(True)
    torch.stack([squares(twin, b) for b in batches]).sum().backward()
    found = {}
    for n in names:
        layer = twin.get_submodule(n)
        G = layer.weight.grad
        G = G.T if type(layer).__name__ in ("Conv1D", "Embedding") else G.flatten(1)
        found[n] = G.double().numpy()
    return found


def product(g: Svd) -> np.ndarray:
    return ((g.U * g.S) @ g.Vh).double().numpy()


def exact(G: np.ndarray) -> Stats:
    return Stats(Svd(*(torch.from_numpy(t.copy()) for t in np.linalg.svd(G, full_matrices=False))))


def matrix(m: int, n: int, power: float = 0.5) -> np.ndarray:
    """Random directions, and singular values k^-power."""
    U, _, V = np.linalg.svd(np.random.default_rng(0).standard_normal((m, n)), full_matrices=False)
    return (U * (1.0 + np.arange(min(m, n))) ** -power) @ V


def pair(G: np.ndarray, r: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """A0 and B0 of loraga from this gradient."""
    given = inits.Start(torch.zeros(G.shape, dtype=torch.float64), r, 1.0, keyed(0, "x"), stats=exact(G))
    A, B = inits.get("loraga").start(given, **options)
    return A.numpy(), B.numpy()


# -- the pass over the batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDS)
def test_the_gradient_is_that_of_the_weight(kind):
    """At a rank where nothing is left out, on Linear, Conv1D, convolutions and embeddings, over several
    batches."""
    model = BUILDS[kind]().double()
    to = {
        "gpt2": r".*(wte|c_attn|c_fc|c_proj)",
        "llama": r".*(embed_tokens|proj)",
        "conv": r"first|second|line|head",
    }
    found = veneer.calibrate(model, some(model), rank=8, width=99, to=to.get(kind), loss=squares)
    for name, G in dense(model, some(model), list(found)).items():
        np.testing.assert_allclose(
            product(found[name].gradient), starts.best(G, 16), atol=1e-10 * np.abs(G).max(), err_msg=name
        )


def test_a_sketch_of_a_matrix_of_low_rank_gives_it_back():
    draw = keyed(0, "test")
    G = torch.randn(90, 4, dtype=torch.float64, generator=draw) @ torch.randn(
        4, 70, dtype=torch.float64, generator=draw
    )
    t = sketch.tests(90, 70, 8, draw)
    assert t.Omega.shape == (70, 8) and t.Psi.shape == (17, 90)
    found = sketch.leading(G @ t.Omega.double(), t.Psi.double() @ G, t.Psi.double(), 4)
    torch.testing.assert_close((found.U * found.S) @ found.Vh, G, rtol=1e-9, atol=1e-9)


def test_a_sketch_is_small_and_close():
    """On a falling spectrum the first step from the sketch is nearly the best one; the sketch has a fraction
    of G's numbers."""
    G, r = matrix(300, 200, 1.0), 3
    t = sketch.tests(300, 200, 4 * r, keyed(0, "test"))
    Y, Z = torch.from_numpy(G) @ t.Omega.double(), t.Psi.double() @ torch.from_numpy(G)
    assert Y.numel() + Z.numel() < G.size / 6
    found = sketch.leading(Y, Z, t.Psi.double(), 2 * r)
    step = starts.first_step(G, found.Vh[:r].numpy(), found.U[:, r:].numpy(), 1.0)
    assert starts.cosine(-step, starts.best(G, 2 * r)) > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_narrow_base_the_sums_are_wide(dtype):
    """In bfloat16 the layers' own rounding is all that differs: 200 equal batches are as far from exact as
    one."""
    model = models.llama().to(dtype)
    name = "model.layers.0.mlp.up_proj"
    G = starts.best(dense(models.llama().double(), some(model, 1), [name])[name], 4)
    errors = []
    for n in (1, 200):
        found = veneer.calibrate(model, some(model, 1) * n, rank=2, width=99, to=[name], loss=squares)[
            name
        ].gradient
        assert found.U.dtype == torch.float32
        errors.append(float(np.linalg.norm(product(found) / n - G) / np.linalg.norm(G)))
    assert errors[1] < 1.01 * errors[0] + 1e-6 and errors[0] < (1e-4 if dtype == torch.float32 else 0.1)


def test_two_processes_find_what_one_does_and_so_does_another_order(tmp_path):
    whole = gloo_child.calibrated(gloo_child.batches(5))
    turned = gloo_child.calibrated(gloo_child.batches(5)[::-1])
    share = gloo_child.share
    processes = [tiny._forks().Process(target=share, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert len(whole) == 6
    for k, t in whole.items():
        assert torch.equal(t, turned[k]) and torch.equal(t, first[k]) and torch.equal(t, second[k]), k


def test_the_model_is_left_as_it_was():
    model = veneer.attach(models.llama(), "lora", rank=2, name="other")
    models.randomise(model, "other")
    model.train()
    model.lm_head.weight.requires_grad_(True)
    before = [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    veneer.calibrate(model, some(model), rank=2, loss=squares)
    after = [(n, p.requires_grad, p.detach()) for n, p in model.named_parameters()]
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert hooks == [len(m._forward_hooks) for m in model.modules()] and veneer.adapters(model) == ["other"]


# -- LoRA-GA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(("m", "n", "r"), [(48, 40, 4), (9, 30, 2), (7, 5, 2)])
def test_the_first_step_is_the_best_of_rank_2r(m, n, r, direction):
    G, s, gamma = matrix(m, n), 16 / math.sqrt(r), 7.0
    A, B = pair(G, r, direction=direction, gamma=gamma)
    step = starts.first_step(G, A, B, s)
    assert starts.cosine(-step, starts.best(G, 2 * r)) > 1 - 1e-12
    np.testing.assert_allclose(
        -step, s**2 * math.sqrt(m) / gamma * starts.best(G, 2 * r), atol=1e-10 * np.abs(step).max()
    )


def test_it_is_the_papers_start():
    G = matrix(48, 40)
    A, B = pair(G, 4)
    theirs = starts.loraga(G, 4)
    np.testing.assert_allclose(np.abs(A), np.abs(theirs[0]), atol=1e-10)
    np.testing.assert_allclose(np.abs(B), np.abs(theirs[1]), atol=1e-10)


def test_where_there_are_fewer_directions_the_first_step_is_the_gradient():
    for r in (3, 5):
        G = matrix(7, 5)
        A, B = pair(G, r)
        assert A.shape == (r, 5) and B.shape == (7, r)
        assert starts.cosine(-starts.first_step(G, A, B, 1.0), G) > 1 - 1e-12


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_another_scale_of_the_loss_is_the_same_start(factor):
    found = []
    for f in (1.0, factor):
        model = models.llama().double()
        stats = veneer.calibrate(model, some(model), rank=2, loss=lambda model, b, f=f: f * squares(model, b))
        veneer.attach(model, "lora", init="loraga", rank=2, stats=stats)
        found.append({n: t for n, t in model.state_dict().items() if "deltas" in n})
    assert {n.rsplit(".", 1)[-1] for n in found[0]} == {"A", "B", "A0", "B0"}
    for n in found[0]:
        torch.testing.assert_close(
            found[1][n], found[0][n], rtol=0, atol=1e-5
        )  # transformers' softmax and norms are float32


def test_pefts_start_of_this_name_is_another_one():
    """PEFT 0.21.2 multiplies B by the gradient's singular values, and scales only B by c
    (tuners/lora/layer.py, lora_ga_init).

    Here, in its own code, m = 48, n = 40, r = 4, gamma 16, rsLoRA alpha 16, at a gradient with singular
    values 1 / sqrt(k): its ||B|| is 0.524 and falls to 5.24e-4 when the loss is multiplied by 1e-3, where the
    paper's is 1.316 for any multiple (and so is ||A||, which PEFT leaves at 2); its first step has cosine
    0.88 with the best one of rank 2r, where the paper's has 1.
    """
    peft = pytest.importorskip("peft")
    m, n, r = 48, 40, 4
    norms, cosines = [], []
    torch.manual_seed(0)  # PEFT's decomposition draws from it
    for scale in (1.0, 1e-3):
        G = scale * matrix(m, n)
        base = nn.Sequential(nn.Linear(n, m, bias=False))
        base[0]._peft_loraga_grad = torch.from_numpy(G).float()
        how = dict(
            init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
        )
        theirs = peft.get_peft_model(
            base, peft.LoraConfig(r=r, lora_alpha=16, use_rslora=True, target_modules=["0"], **how)
        )
        layer = theirs.base_model.model[0]
        A, B = (layer.get_parameter(f"lora_{x}.default.weight").detach().double().numpy() for x in "AB")
        norms.append((np.linalg.norm(A), np.linalg.norm(B)))
        cosines.append(starts.cosine(-starts.first_step(G, A, B, 8.0), starts.best(G, 2 * r)))
        own = pair(G, r)
        assert np.linalg.norm(own[0]) == pytest.approx(1.316, abs=1e-3) and np.linalg.norm(
            own[1]
        ) == pytest.approx(1.316, abs=1e-3)
    assert norms[0][0] == pytest.approx(2.0, abs=1e-3) and norms[1][0] == pytest.approx(2.0, abs=1e-3)
    assert norms[0][1] == pytest.approx(0.524, abs=0.002) and norms[1][1] == pytest.approx(5.24e-4, abs=2e-6)
    assert cosines == pytest.approx([0.88, 0.88], abs=0.03)


# -- orthogonal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 5, 8])
def test_orthogonal_factors_multiply_to_zero_and_are_not(r):
    W = torch.zeros(300, 200, dtype=torch.float64)
    A, B = inits.get("orthogonal").start(inits.Start(W, r, 2.0, keyed(3, "x")), size=0.2)
    assert float((B @ A).abs().max()) < 1e-14
    assert torch.linalg.matrix_rank(A) == (r + 1) // 2 and torch.linalg.matrix_rank(B) == r // 2
    # Rows of Q have norm 1: on average every number of A has variance size^2 * ceil(r/2) / r.
    for factor, half in ((A, (r + 1) // 2), (B, r // 2)):
        assert float(factor.square().mean()) == pytest.approx(0.04 * half / r, rel=0.15)


# -- as adapters ---------------------------------------------------------------------------------------------


def attached(build: Any, method: str = "lora", **options: Any) -> nn.Module:
    model = build()
    stats = veneer.calibrate(model, some(model), rank=2, loss=squares)
    return veneer.attach(model, method, init="loraga", rank=2, stats=stats, **options)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "conv"])
def test_saved_relative_to_the_untouched_base(kind, method, tmp_path):
    ours = attached(BUILDS[kind], method, init_options={"gamma": 64, "direction": "A2rBr"})
    assert torch.equal(models.output(ours), models.output(BUILDS[kind]()))
    models.randomise(ours)
    probe = {} if kind != "conv" else {"probe": models.inputs(ours)}
    again = veneer.load(BUILDS[kind](), veneer.save(ours, tmp_path, **probe))
    torch.testing.assert_close(models.output(again), models.output(ours), rtol=1e-4, atol=1e-4)
    assert [d.options for _, d in changes(again, "default")] == [
        d.options for _, d in changes(ours, "default")
    ]


def test_peft_opens_it_at_twice_the_rank(tmp_path):
    peft = pytest.importorskip("peft")
    ours = attached(models.llama, stabilised=True)
    models.randomise(ours)
    veneer.save(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        config["r"] == 4 and config["lora_alpha"] == pytest.approx(16 * math.sqrt(2)) and config["use_rslora"]
    )
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    torch.testing.assert_close(models.output(theirs), models.output(ours), rtol=1e-4, atol=1e-4)


def test_a_change_of_our_own_layout_comes_back_without_statistics(tmp_path):
    """Where PEFT cannot express it (a grouped convolution), the change is built again before its tensors are
    read."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)).eval()

    x, ours = torch.randn(2, 4, 7, 7), build()
    stats = veneer.calibrate(ours, [x], rank=2, to=["0"], loss=lambda m, x: m(x).square().sum())
    veneer.attach(ours, "lora", to=["0"], rank=2, init="loraga", stats=stats)
    models.randomise(ours)
    again = veneer.load(build(), veneer.save(ours, tmp_path, probe={"input": x}))
    torch.testing.assert_close(again(x), ours(x), rtol=0, atol=0)


def test_the_default_scale_is_rslora_with_alpha_16():
    scales = {
        d.scaling
        for stabilised in (False, True)
        for _, d in changes(attached(models.llama, stabilised=stabilised), "default")
    }
    assert all(s == pytest.approx(16 / math.sqrt(2), rel=1e-12) for s in scales)


# -- in a training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


def settings(place: Path, out: Path, **options: Any) -> dict[str, Any]:
    own = {"rank": 4, **options}
    return tiny.settings(place, options=own, lr=2e-3, calibration=5, out=str(out))


@pytest.mark.parametrize(("init", "lr"), [("loraga", 2e-3), ("orthogonal", 1e-2)])
def test_a_training_learns(place, tmp_path, init, lr):
    result = fit(Run.from_dict({**settings(place, tmp_path / "run", init=init), "lr": lr}), progress=False)
    lines = [m["valid_bpb"] for m in tiny.metrics(tmp_path / "run") if "valid_bpb" in m]
    assert lines[-1] < lines[0] - 0.1
    said = [n for n in result.metrics["notes"] if "used statistics" in n]
    assert said == (
        ["init 'loraga' used statistics of 5 windows of the training text"] if init == "loraga" else []
    )


def test_a_resumed_training_keeps_its_start_and_looks_at_nothing_again(place, tmp_path, monkeypatch):
    whole, given = (
        settings(place, tmp_path / "whole", init="loraga"),
        settings(place, tmp_path / "part", init="loraga"),
    )
    fit(Run.from_dict(whole), progress=False)
    real, steps = Learner.step, iter(range(1, 99))

    def step(*args: Any) -> Any:
        if next(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Learner, "step", step)
        fit(Run.from_dict(given), progress=False)
    monkeypatch.setattr(calibration, "look", lambda *args: pytest.fail("calibrated again"))
    fit(Run.from_dict({**given, "resume": True}), progress=False)
    ours, theirs = (Path(run["out"]) / "adapter" / "adapter_model.safetensors" for run in (given, whole))
    assert ours.read_bytes() == theirs.read_bytes()
    assert tiny.metrics(Path(given["out"])) == tiny.metrics(Path(whole["out"]))


def test_its_default_rate_is_that_of_full_fine_tuning():
    for builtin in (True, False):
        assert rates.default("lora", "adamw", builtin, "loraga") == rates.default("full", "adamw", builtin)
        assert rates.default("lora", "adamw", builtin, "pissa") == rates.default("lora", "adamw", builtin)
        assert rates.default("lora", "loraplus", builtin, "loraga") == rates.default(
            "lora", "loraplus", builtin
        )


# -- refusals ------------------------------------------------------------------------------------------------


def refused(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as e:
        call()
    return str(e.value)


def test_without_statistics_it_is_no_plain_lora():
    text = refused(ConfigError, lambda: veneer.attach(models.llama(), "lora", init="loraga", rank=2))
    assert text == (
        "this init starts from the loss's gradient, which is missing; calibrate first:"
        " stats = veneer.calibrate(model, batches, rank=..), then veneer.attach(.., stats=stats)"
    )


def test_statistics_that_do_not_fit_are_refused():
    model = models.llama()
    stats = veneer.calibrate(model, some(model), rank=2, to=["q_proj"], loss=squares)

    def attach(method: str = "lora", **options: Any) -> nn.Module:
        return veneer.attach(model, method, **{"to": ["q_proj"], "stats": stats, "init": "loraga", **options})

    assert (
        refused(ConfigError, lambda: attach(rank=4))
        == "calibrated for rank 2, the rank here is 4; calibrate with rank=4"
    )
    assert refused(ConfigError, lambda: attach(to=["q_proj", "k_proj"], rank=2)) == (
        "stats= says nothing of 2 layers: model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj;"
        " calibrate with the same to= and exclude="
    )
    other = {n.replace("q_proj", "up_proj"): s for n, s in stats.items()}
    swapped = {n.replace("self_attn", "mlp"): s for n, s in other.items()}
    assert refused(ConfigError, lambda: attach(to=["up_proj"], rank=2, stats=swapped)) == (
        "the statistics are of a layer (32, 32), this layer is (48, 32); calibrate on this model"
    )

    text = refused(
        ConfigError, lambda: attach(init="loftq", rank=2)
    )  # which knows the gradient, and not what quantisation took
    assert text.startswith(
        "this init starts from the quantisation error of W, which is missing; quantise for it first:"
    )

    class Plain(veneer.methods.Delta):
        pass

    text = refused(ConfigError, lambda: veneer.attach(model, Plain, stats=stats))
    assert text == "method 'test_starts' starts without a look at the loss; leave stats= out"
    assert not veneer.adapters(model)


def test_options_of_a_start_are_checked():
    layer = nn.Sequential(nn.Linear(6, 5))
    stats = {"0": exact(matrix(5, 6))}

    def attach(**options: Any) -> nn.Module:
        return veneer.attach(layer, "lora", to=["0"], stats=stats, **{"rank": 2, "init": "loraga", **options})

    assert refused(ConfigError, lambda: attach(init_options={"gama": 3, "direction": 5})) == (
        "init 'loraga' has no option 'gama'; did you mean 'gamma'?\ninit_options: direction must be a word,"
        " got 5"
    )
    none = refused(ConfigError, lambda: attach(init="pissa", init_options={"gamma": 3}))
    assert none == "init 'pissa' has no option 'gamma'; it takes no options"
    assert (
        refused(ConfigError, lambda: attach(init_options={"gamma": "x"}))
        == "init_options: gamma must be a number, got 'x'"
    )
    assert (
        refused(ConfigError, lambda: attach(init_options={"gamma": 0}))
        == "init_options: gamma must be a number above 0, got 0"
    )
    assert refused(ConfigError, lambda: attach(init_options={"direction": "ArBr2"})) == (
        "init_options: unknown direction 'ArBr2'; did you mean 'ArBr'?"
    )
    assert refused(ConfigError, lambda: attach(init="orthogonal", init_options={"size": -1})) == (
        "init_options: size must be a number above 0, got -1"
    )
    assert refused(ShapeError, lambda: attach(init_options={"direction": "ArBr"}, rank=3)) == (
        "direction 'ArBr' needs 2 x 3 directions, a layer (5, 6) has 5; use 'ArB2r'"
    )


def test_a_calibration_that_cannot_tell_anything_says_so():
    model = models.llama()

    def calibrate(batches: list[Any], **options: Any) -> Any:
        return veneer.calibrate(model, batches, **{"rank": 2, "loss": squares, **options})

    assert refused(DataError, lambda: calibrate([])) == (
        "calibration got no batch; pass some of the training's text"
    )
    assert refused(ConfigError, lambda: calibrate(some(model), rank=0, width=1)) == (
        "rank 0 must be 1 or more\nwidth 1 must be 2 or more: a start of rank r needs 2 r directions"
    )
    assert refused(ConfigError, lambda: calibrate(some(model), loss=None)) == (
        "calibration needs one number to differentiate for each batch, not None; put labels into the"
        " batches, or pass loss="
    )
    wide = refused(ConfigError, lambda: calibrate(some(model), loss=lambda m, b: m(**b).logits))
    assert "not a tensor (2, 7, 97);" in wide
    nothing = refused(
        SiteError, lambda: calibrate(some(model), loss=lambda m, b: 0.0 * squares(m, b), to=["q_proj"])
    )
    assert nothing == (
        "the loss has no gradient at 2 layers: model.layers.0.self_attn.q_proj,"
        " model.layers.1.self_attn.q_proj; is every label"
        " masked? Or leave them out with exclude="
    )
    wild = refused(
        SiteError, lambda: calibrate(some(model), loss=lambda m, b: math.inf * squares(m, b), to=["q_proj"])
    )
    assert wild.startswith("the gradient is not finite at 2 layers: model.layers.0.self_attn.q_proj, ")
    idle = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapper = torch.compile(nn.Sequential(nn.Linear(4, 4)))
    assert refused(ConfigError, lambda: veneer.calibrate(wrapper, [torch.ones(2, 4)], rank=1)).startswith(
        "model: must not be torch.compile's wrapper"
    )
    assert "1 adapted layers were never called" in refused(
        SiteError,
        lambda: veneer.calibrate(
            idle, [torch.ones(2, 4)], rank=1, loss=lambda m, x: m[0](x).sum(), to=["0", "1"]
        ),
    )
    assert not veneer.adapters(model) and not veneer.adapters(idle)


def test_settings_are_checked_before_anything_is_read():
    with pytest.raises(ConfigError) as e:
        Run.from_dict(
            {"data": "x.txt", "calibration": 0, "options": {"init": "loraga", "init_options": {"gama": 1}}}
        )
    assert (
        str(e.value)
        == "calibration must be 1 or more, got 0\ninit 'loraga' has no option 'gama'; did you mean 'gamma'?"
    )
    with pytest.raises(ConfigError, match=r"unknown init 'lorag'; did you mean 'loraga'\?"):
        Run.from_dict({"data": "x.txt", "options": {"init": "lorag"}})


def test_options_of_a_start_on_the_command_line(place, tmp_path):
    from veneer.cli.frame import main

    own = settings(place, tmp_path / "run")
    words = [
        "fit",
        "--model",
        own["model"],
        "--data",
        own["data"],
        "--length",
        "32",
        "--steps",
        "1",
        "--no-report",
        "--out",
        own["out"],
    ]
    assert (
        main(
            [
                *words,
                "--rank",
                "2",
                "--init",
                "loraga",
                "--init-options",
                "gamma=64",
                "--init-options",
                "direction=A2rBr",
            ]
        )
        == 0
    )
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["run"]["options"]
    assert kept == {"rank": 2, "init": "loraga", "init_options": {"gamma": 64.0, "direction": "A2rBr"}}


# By the papers: a start out of the weight (PiSSA, OLoRA, CorDA; LoftQ and QPiSSA out of its quantisation
# error), of the loss's gradient (LoRA-GA, GoRA, KeepLoRA), or of the layer's inputs (EVA, CorDA).
@pytest.mark.parametrize(
    ("need", "wanted"),
    [
        ("of_weight", {"pissa", "olora", "corda", "loftq", "qpissa"}),
        ("leading", {"pissa"}),
        ("residual", {"loftq", "qpissa"}),
        ("gradient", {"loraga", "gora", "keeplora"}),
        ("mean", {"gora"}),
        ("acts", {"gora"}),
        ("inputs", {"eva"}),
        ("oriented", {"corda"}),
        ("data", {"loraga", "gora", "keeplora", "eva", "corda"}),
    ],
)
def test_a_start_says_what_it_is_made_of(need, wanted):
    assert {name for name in inits.available() if getattr(inits.needs(name), need)} == wanted
    assert all(inits.needs(name).sentence for name in wanted)
