"""Starts that are taken out of the weights: found for several layers at once, and told of in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import models, tiny
from torch import nn

import veneer
from veneer import methods
from veneer.adapt import leading_parts
from veneer.adapt.attached import changes
from veneer.cli.run_verbs import summary
from veneer.errors import ShapeError
from veneer.models import pretrained
from veneer.ops.matrix import linalg
from veneer.runs.fit import fit
from veneer.sites import site_for
from veneer.train.run import Run


def attached(method: str = "lora", **options: Any) -> torch.nn.Module:
    return veneer.attach(
        models.llama(hidden_size=64, intermediate_size=80), method, **{"rank": 3, "init": "pissa", **options}
    )


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        site.name: (start.B @ start.A).double()
        for site, delta in changes(model, "default")
        if (start := delta.taken())
    }


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 5, "down_proj": 40}, "seed": 4}])
def test_layers_of_one_shape_together_start_as_each_alone(method, options, monkeypatch):
    calls = []
    monkeypatch.setattr(
        leading_parts,
        "leading_svds",
        lambda Ws, *rest: calls.append(len(Ws)) or linalg.leading_svds(Ws, *rest),
    )
    together = factors(attached(method, **options))
    assert max(calls) >= 4 and sum(calls) == len(together) == 14
    monkeypatch.setattr(leading_parts, "AT_ONCE", {})
    calls.clear()
    alone = factors(attached(method, **options))
    assert calls == [1] * 14
    for name, product in alone.items():
        assert float((together[name] - product).norm() / product.norm()) < 1e-5, name
    if not options:
        (name, product), *none = factors(attached(method, to=["1.self_attn.v_proj"])).items()
        assert torch.equal(product, alone[name]) and not none


def test_a_stack_holds_no_more_than_its_bound(monkeypatch):
    monkeypatch.setattr(leading_parts, "AT_ONCE", {"cpu": 3 * 64 * 64})
    sizes = []
    monkeypatch.setattr(
        leading_parts,
        "leading_svds",
        lambda Ws, *rest: sizes.append(sum(W.numel() for W in Ws)) or linalg.leading_svds(Ws, *rest),
    )
    attached()
    assert (
        max(sizes) == 3 * 64 * 64 and len(sizes) == 6
    )  # q and o: 3 + 1; k and v: 4; gate and up: 2 + 2; down: 2


def test_a_rank_that_does_not_fit_is_refused_by_every_layer_that_it_does_not_fit():
    with pytest.raises(
        ShapeError, match=r"rank 33 > min\(out, in\) = 32 at 'model.layers.0.self_attn.k_proj'"
    ) as e:
        attached(rank=33, to=["k_proj", "v_proj"])
    assert len(str(e.value).splitlines()) == 4


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("starts")


def trained(place: Path, out: Path, *, options: dict[str, Any] | None = None, **given: Any) -> Any:
    own = tiny.settings(place, out=str(out), steps=2, eval_every=2, options={"rank": 4, **(options or {})})
    return fit(Run.from_dict({**own, **given}), progress=False)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_run_tells_what_its_start_leaves_of_the_weights(place, tmp_path, init):
    result = trained(place, tmp_path / "run", options={"init": init}, report=True, precision="fp32")
    told = result.metrics["start"]
    model = pretrained.causal_lm(tiny.settings(place)["model"], torch.float32, torch.device("cpu"))
    assert told["init"] == init and len(told["layers"]) > 3
    for name, share in told["layers"].items():
        W = model.get_submodule(name).weight.detach().double().numpy()
        if init == "pissa":
            s = np.linalg.svd(W, compute_uv=False)
            assert share == pytest.approx(np.linalg.norm(s[4:]) / np.linalg.norm(s), rel=1e-3)
        else:
            Q = np.linalg.qr(W)[0][:, :4]
            assert share == pytest.approx(np.linalg.norm(W - Q @ (Q.T @ W)) / np.linalg.norm(W), rel=1e-4)
    shares = list(told["layers"].values())
    assert told["left"] == {
        "median": pytest.approx(np.median(shares)),
        "least": min(shares),
        "most": max(shares),
    }
    sentence = (
        f"init {init} leaves {100 * told['left']['median']:.3g} % of the norm of a weight in the median"
    )
    assert sentence in summary(result) and sentence in (tmp_path / "run/report.html").read_text(
        encoding="utf-8"
    )
    assert any(sentence in note for note in result.metrics["notes"])


def test_a_quantised_base_tells_what_neither_codes_nor_start_hold(place, tmp_path):
    result = trained(place, tmp_path / "run", options={"init": "qpissa"}, quantise="nf4", report=False)
    assert 0 < result.metrics["start"]["left"]["median"] < 0.1  # nf4 alone leaves about a tenth


def test_a_start_that_is_not_of_the_weights_is_not_told_of(place, tmp_path):
    result = trained(place, tmp_path / "run", report=False)
    assert "start" not in result.metrics and "leaves" not in summary(result)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora", "kaiming"])
def test_the_subtracted_start_has_the_scale_of_the_change(method: str, init: str) -> None:
    torch.manual_seed(0)
    site = site_for("0", nn.Linear(12, 10).double())
    delta = methods.build(methods.get(method), site, {"rank": 3, "alpha": 6.0, "init": init})
    pair, taken = getattr(delta, "lora", delta), delta.taken()
    assert (taken is None) == (init == "kaiming")
    if taken is not None:
        torch.testing.assert_close(taken.B @ taken.A, 2.0 * pair.B @ pair.A)  # s = 6 / 3


@pytest.mark.parametrize(
    ("method", "given", "spread"),
    [
        ("lora", {"init": "gaussian"}, 900**-0.5),
        ("lora", {"init": "kaiming"}, 900**-0.5),
        ("dora", {}, 900**-0.5),
        ("hira", {}, 900**-0.5),
        ("bottleneck", {}, 900**-0.5),
        ("adalora", {}, 0.02),
    ],
)
def test_drawn_starts_are_as_wide_as_their_papers_say(
    method: str, given: dict[str, Any], spread: float
) -> None:
    """Of 300 inputs: 1 / sqrt(3 in), drawn evenly or normally."""
    site = site_for("0", nn.Linear(300, 300))
    delta = methods.build(methods.get(method), site, {"rank": 64, **given})
    drawn = delta.get_parameter({"bottleneck": "D", "dora": "lora.A"}.get(method, "A"))
    assert float(drawn.detach().std()) == pytest.approx(spread, rel=0.03)  # five standard errors
    assert abs(float(drawn.detach().mean())) < 0.04 * spread


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_of_a_weight_with_zeros_is_subtracted_too(method: str, init: str) -> None:
    """An input that the layer ignores, and an output that is always zero."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 10).double()
    with torch.no_grad():
        layer.weight[:, 3] = 0
        layer.weight[4] = 0
    site = site_for("0", layer)
    delta = methods.build(methods.get(method), site, {"rank": 3, "init": init})
    assert delta.taken() is not None
    torch.testing.assert_close(delta.delta(site), torch.zeros(10, 12).double(), rtol=0, atol=1e-14)
