"""Layers of low rank: their forms, sites and files, and adapters on them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import models
from torch import nn

import veneer
from veneer.compress import folder as folders
from veneer.compress.places import Places
from veneer.errors import ConfigError, FormatError, VeneerError
from veneer.models import pretrained
from veneer.ops.matrix.pivots import LARGEST, pivots
from veneer.sites import changed, find, site_for
from veneer.sites.factored.layers import (
    Factored,
    FactoredLinear,
    PivotedLinear,
    holding,
    parameters_of,
    rank_within,
)
from veneer.sites.quantised import formats

FORMS = pytest.mark.parametrize("form", ["plain", "pivoted"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def factored(build=models.llama, form: str = "plain", rank: int = 12, dtype=torch.float32) -> nn.Module:
    """A model whose linear layers are cut to a rank by the SVD of their weights."""
    model = build().to(dtype)
    places = Places(model)
    for site in find(model):
        U, S, Vh = torch.linalg.svd(site.weight().detach().double(), full_matrices=False)
        r = min(rank, len(S))
        A, B = S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt()
        bias = getattr(site.module, "bias", None)
        made = holding(form, A.to(dtype), B.to(dtype), None if bias is None else bias.detach())
        made.transposed = site.kind == "transposed"
        places.put(site.module, made)
    return model


# -- pivots and forms --------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(out=st.integers(1, 30), r=st.integers(1, 30), seed=st.integers(0, 2**31), spread=st.integers(0, 6))
def test_pivot_rows_make_the_others_with_small_coefficients(out, r, seed, spread):
    r = min(r, out)
    B = normal(out, r, seed=seed) * torch.logspace(0, -spread, r, dtype=torch.float64)
    held = pivots(B)
    assert sorted(held.rows.tolist() + held.others.tolist()) == list(range(out))
    torch.testing.assert_close(held.C @ B[held.rows], B[held.others], rtol=0, atol=1e-11)
    whole = torch.cat([torch.eye(r, dtype=torch.float64), held.C])[held.order]
    torch.testing.assert_close(whole @ B[held.rows], B, rtol=0, atol=1e-11)
    assert not held.C.numel() or float(held.C.abs().max()) <= LARGEST + 1e-9


@FORMS
@pytest.mark.parametrize(("out", "in_", "rank"), [(5, 7, 3), (7, 5, 1), (6, 6, 6), (4, 9, 4), (9, 4, 4)])
def test_a_form_holds_its_product_in_the_numbers_that_it_promises(form, out, in_, rank):
    A, B, bias, x = normal(rank, in_), normal(out, rank, seed=1), normal(out, seed=2), normal(2, 3, in_)
    layer = holding(form, A, B, bias)
    torch.testing.assert_close(layer.weight, B @ A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), x @ (B @ A).mT + bias, rtol=1e-12, atol=1e-12)
    n = sum(p.numel() for p in layer.parameters()) - out
    assert n == parameters_of(out, in_, rank, form) and layer.rank == rank
    assert form == "plain" or n <= out * in_


@settings(max_examples=200, deadline=None)
@given(
    out=st.integers(1, 400),
    in_=st.integers(1, 400),
    share=st.floats(0.001, 1.0),
    form=st.sampled_from(["plain", "pivoted"]),
)
def test_the_rank_within_a_budget_is_the_largest(out, in_, share, form):
    numbers = share * out * in_
    rank = rank_within(out, in_, numbers, form)
    assert 0 <= rank <= min(out, in_) and parameters_of(out, in_, rank, form) <= numbers
    assert rank == min(out, in_) or parameters_of(out, in_, rank + 1, form) > numbers


def test_pivoted_storage_has_the_published_ranks_at_equal_numbers():
    at = {rho: rank_within(4096, 4096, rho * 4096 * 4096, "pivoted") for rho in (0.9, 0.8, 0.6, 0.4)}
    assert at == {0.9: 2800, 0.8: 2264, 0.6: 1505, 0.4: 923}


def test_rounding_costs_a_pivoted_layer_a_few_times_what_it_costs_a_plain_one():
    A, B = normal(64, 128), normal(128, 64, seed=1)
    errors = {}
    for form in ("plain", "pivoted"):
        layer = holding(form, A, B).bfloat16()
        errors[form] = float((layer.weight.double() - B @ A).norm() / (B @ A).norm())
    assert errors["plain"] < 0.005 and errors["pivoted"] < 0.015


# -- as a site --------------------------------------------------


def test_a_factored_layer_is_one_site_whatever_names_it():
    model = factored()
    names = [s.name for s in find(model)]
    assert names == [s.name for s in find(models.llama())]
    assert [s.name for s in find(model, r".*q_proj.*")] == [n for n in names if n.endswith("q_proj")]
    with pytest.raises(veneer.errors.SiteError, match="no layer is called"):
        find(model, ["q_proj.A"])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_appends_the_change_and_loses_only_its_own_rounding(form, dtype):
    layer = holding(form, normal(6, 40).to(dtype), normal(24, 6, seed=1).to(dtype))
    model, x = nn.Sequential(layer), normal(5, 40).to(dtype)
    before = layer.weight.clone()
    veneer.attach(model, "lora", to=["0"], rank=2)
    models.randomise(model, size=0.01)
    change = veneer.adapt.attached.changes(model, "default")[0][1].delta(site_for("0", layer)).detach()
    y = model(x)
    verdict = veneer.merge(model)
    assert verdict.error < (1e-4 if dtype == torch.float32 else 2**-7)
    assert isinstance(model[0], FactoredLinear) and model[0].rank == 8
    written = model[0].weight - before
    assert float((written - change).norm()) < (1e-4 if dtype == torch.float32 else 2**-7) * change.norm()
    torch.testing.assert_close(model(x), y, rtol=2**-5, atol=4 * float(y.detach().abs().max()) * 2**-8)


def test_a_merge_of_full_rank_factors_the_whole_anew():
    model = nn.Sequential(holding("plain", normal(3, 7), normal(5, 3)))
    veneer.attach(model, "fourierft", to=["0"], frequencies=20)
    models.randomise(model, size=30.0)
    x = normal(4, 7)
    y = model(x)
    veneer.merge(model)
    assert model[0].rank == 5
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)


# -- quantised factors --------------------------------------------------


@FORMS
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantiser_packs_both_factors_and_an_adapter_hangs_on_the_whole(form, format):
    model = factored(form=form)
    n = len(find(model))
    veneer.quantise(model, format)
    inner = model.model.layers[0].mlp.up_proj
    assert set(formats(model).values()) == {format} and len(formats(model)) == 2 * n
    assert inner.formats() == dict.fromkeys(inner.inner, format)
    x = normal(3, 32, dtype=torch.float32)
    torch.testing.assert_close(inner(x), x @ inner.weight.mT, rtol=1e-4, atol=1e-4)
    veneer.attach(model, "lora", rank=2)
    base = models.output(model)
    models.randomise(model)
    y = models.output(model)
    assert not torch.equal(base, y)
    veneer.dequantise(model)
    assert not formats(model) and isinstance(model.model.layers[0].mlp.up_proj, Factored)
    torch.testing.assert_close(models.output(model), y, rtol=1e-4, atol=1e-4)


def test_pivoted_factors_in_four_bits_are_warned_of():
    with pytest.warns(
        UserWarning, match=r"pivoted layers lose far more in nf4 .* storage='plain', or use int8"
    ):
        veneer.quantise(factored(form="pivoted"), "nf4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.quantise(factored(form="pivoted"), "int8")
        veneer.quantise(factored(form="plain"), "nf4")


def test_quantised_factors_are_kept_beside_their_compressed_base(tmp_path):
    model = factored()
    veneer.save_compressed(model, tmp_path / "small")
    opened = pretrained.causal_lm(str(tmp_path / "small"), torch.float32, torch.device("cpu"), "nf4")
    veneer.save_quantised(opened, tmp_path / "packed")
    again = pretrained.causal_lm(str(tmp_path / "packed"), torch.float32, torch.device("cpu"))
    assert torch.equal(models.output(again), models.output(opened))
    assert changed.forms_of(again) == {"quantised": ["nf4"], "factored": ["plain"]}


# -- files --------------------------------------------------


@FORMS
@pytest.mark.parametrize("build", [models.llama, models.gpt2])
def test_a_folder_opens_as_the_model_that_was_saved(form, build, tmp_path):
    model = factored(build, form)
    veneer.save_compressed(model, tmp_path / "small", record={"method": "svd"})
    again = veneer.load_compressed(tmp_path / "small")
    assert torch.equal(models.output(again), models.output(model))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    record = json.loads((tmp_path / "small" / "factored.json").read_text())
    assert record["method"] == "svd" and len(record["layers"]) == len(find(model))
    half = veneer.load_compressed(tmp_path / "small", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_tied_head_stays_tied(tmp_path):
    model = factored(lambda: models.llama(tie_word_embeddings=True))
    veneer.save_compressed(model, tmp_path / "small")
    again = veneer.load_compressed(tmp_path / "small")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(models.output(again), models.output(model))


def test_other_programs_refuse_the_folder_instead_of_drawing_layers(tmp_path):
    from transformers import AutoModelForCausalLM

    veneer.save_compressed(factored(), tmp_path / "small")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("build", [models.llama, models.gpt2])
def test_expanded_it_is_what_any_program_opens(build, tmp_path):
    from transformers import AutoModelForCausalLM

    model = factored(build)
    y = models.output(model)
    veneer.attach(model, "lora", rank=2)
    models.randomise(model)
    adapted = models.output(model)
    veneer.expand(model)
    torch.testing.assert_close(models.output(model), adapted, rtol=1e-4, atol=1e-4)
    veneer.detach(model)
    assert not changed.forms_of(model)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(models.output(again), y, rtol=1e-4, atol=1e-4)


def test_a_bias_that_the_class_lacks_cannot_be_expanded():
    model = factored()
    model.model.layers[0].mlp.up_proj.added_bias = True
    with pytest.raises(ConfigError, match=r"1 factored layers have a bias that their class lacks"):
        veneer.expand(model)
    assert changed.forms_of(model)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    path = veneer.save_compressed(factored(), tmp_path / "small")
    record = json.loads((path / "factored.json").read_text())

    def refused(changes: dict, match: str) -> None:
        (path / "factored.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(FormatError, match=match):
            veneer.load_compressed(path)

    refused({"format": 9}, "has format 9, not 1")
    refused({"layers": {"a": {"form": "plain"}}}, "damaged at a")
    refused({"layers": {"a": record["layers"]["model.layers.0.mlp.up_proj"]}}, "a is missing in the model")
    name, entry = next(iter(record["layers"].items()))
    refused({"layers": {**record["layers"], name: {**entry, "rank": 2}}}, "of another model")
    refused({"files": {"factored.safetensors": "0"}}, r"is not the file that factored\.json describes")
    (path / "factored.safetensors").unlink()
    refused({}, "is missing")
    with pytest.raises(FormatError, match=r"there is no .*factored\.json"):
        veneer.load_compressed(tmp_path)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    model = factored()
    with pytest.raises(ConfigError, match="no layer is factored"):
        veneer.save_compressed(models.llama(), tmp_path / "a")
    veneer.attach(model, "lora", rank=2)
    with pytest.raises(ConfigError, match=r"adapters are attached \(default\)"):
        veneer.save_compressed(model, tmp_path / "a")
    veneer.detach(model)
    with pytest.raises(ConfigError, match="exists; choose another"):
        veneer.save_compressed(model, tmp_path)
    with pytest.raises(ConfigError, match=r"are quantised; use veneer\.save_quantised"):
        veneer.save_compressed(veneer.quantise(copy.deepcopy(model)), tmp_path / "a")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(VeneerError, match="its disk has 0 MB left"):
        veneer.save_compressed(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# -- the round trip --------------------------------------------------

AGAIN = """
import sys, torch, veneer
sys.path[:0] = [sys.argv[1]]
from support import models
for place in sys.argv[2:]:
    model = veneer.load_compressed(place + "/small")
    veneer.load(model, place + "/adapter")
    torch.save(models.output(model), place + "/out")
    veneer.merge(model)
    torch.save(models.output(model), place + "/merged")
"""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A model of each form with an adapter, and its folder of files that one other process opened."""
    made = {}
    for form in ("plain", "pivoted"):
        place = tmp_path_factory.mktemp(form)
        veneer.save_compressed(factored(form=form), place / "small")
        model = veneer.load_compressed(place / "small")
        veneer.attach(model, "lora", rank=2)
        models.randomise(model)
        veneer.save(model, place / "adapter")
        made[form] = model, place
    places = [str(place) for _, place in made.values()]
    tests = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", AGAIN, tests, *places], check=True, timeout=300)
    return made


@FORMS
def test_saved_adapted_and_opened_in_another_process_it_does_the_same(form, adapted):
    model, place = adapted[form]
    manifest = json.loads((place / "adapter" / "veneer.json").read_text())
    assert manifest["base"]["factored"] == [form]
    with pytest.raises(FormatError, match=rf"the adapter's is factored \({form}\), this model is plain"):
        veneer.load(models.llama(), place / "adapter")
    y = models.output(model)
    torch.testing.assert_close(torch.load(place / "out"), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.load(place / "merged"), y, rtol=1e-3, atol=1e-3)


def test_layers_survive_copies_pickles_and_compilation():
    model = nn.Sequential(holding("pivoted", normal(3, 8), normal(6, 3), normal(6)))
    x = normal(4, 8)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y) and isinstance(model[0], PivotedLinear)
    torch._dynamo.reset()  # other tests fill the cache of these functions
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    assert "rank=3" in repr(model)
