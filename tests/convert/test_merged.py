"""Every type of adapter that PEFT saves: opened with PEFT's outputs, or refused with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.peft_types import SETTINGS, TASK, UNMADE, outputs, saved
from torch import nn

import veneer
from veneer.adapt import hooks
from veneer.adapt.attached import changes
from veneer.adapt.peft import types
from veneer.convert.merged import holding, layers, opening
from veneer.errors import ConfigError, FormatError, NotMergeable
from veneer.methods.base.biased import Biased
from veneer.methods.lora import LoRA
from veneer.sites import site_for
from veneer.verbs.convert import convert

CLOSE = 5e-6  # relative, float32 through two layers
EVERY = sorted(t.value for t in peft.PeftType)
# The class of the changes by the first words of the stated layout; the layers are too narrow for others.
LAYOUTS = {
    "factors": {"LoRA"},
    "sparse": {"SHiRA"},
    "sparse or dense": {"SHiRA", "Dense"},
    "dense": {"Dense"},
    "biases": {"BitFit"},
    "weights and biases of norms": {"Full"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with the tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return str(folder)


def apart(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_the_table_names_every_type_once():
    assert set(SETTINGS) == set(EVERY) == set(types.every())
    by = {t: way.by for t, way in types.every().items()}
    assert {t for t in EVERY if by[t] == "load"} == types.NATIVE
    assert not set(types.CONVERTED) & set(types.REFUSED)
    assert sum(way != "no" for way in by.values()) >= 36
    assert {t for t in EVERY if by[t] == "no"} == {*UNMADE, "LILY"}
    assert types.opened("BONE") is None


@pytest.mark.parametrize("peft_type", [t for t in EVERY if t not in UNMADE and t != "LILY"])
def test_every_type_computes_what_peft_computes(peft_type, tmp_path):
    wanted = saved(peft_type, models.llama(), tmp_path / "theirs")
    ours = models.llama()
    before = outputs(ours)
    if types.opened(peft_type).by == "load":
        veneer.load(ours, tmp_path / "theirs")
    else:
        task = TASK if peft_type == "POLY" else None
        found = opening.to_changes(ours, tmp_path / "theirs", task)
        assert torch.equal(outputs(ours), before)
        stated = types.CONVERTED[peft_type].form.partition(",")[0]
        assert {type(delta).__name__ for _, delta in found} <= LAYOUTS[stated]
        hooks.hang(ours, "default", found)
        veneer.save(ours, tmp_path / "ours")
        ours = veneer.load(models.llama(), tmp_path / "ours")
    assert apart(before, wanted) > 1e-3, "the adapter changes nothing"
    assert apart(outputs(ours), wanted) < CLOSE


@pytest.mark.parametrize("peft_type", [*UNMADE, "LILY"])
def test_types_that_change_no_weights_are_refused_with_the_reason(peft_type, tmp_path):
    saved(peft_type, models.llama(), tmp_path / "theirs")
    reason = f"peft_type '{peft_type}' cannot be read: {types.REFUSED[peft_type]}"
    with pytest.raises(FormatError) as refused:
        veneer.load(models.llama(), tmp_path / "theirs")
    assert reason in str(refused.value)


def test_the_model_is_left_as_it_was(tmp_path):
    saved("C3A", models.llama(), tmp_path / "theirs")
    ours = models.llama()
    ours.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in ours.named_parameters()}
    state = {n: t.clone() for n, t in ours.state_dict().items()}
    kinds = {n: type(m) for n, m in ours.named_modules()}
    own = sorted(vars(ours))
    opening.to_changes(ours, tmp_path / "theirs")
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == flags
    assert {n: type(m) for n, m in ours.named_modules()} == kinds and sorted(vars(ours)) == own
    assert all(torch.equal(t, state[n]) for n, t in ours.state_dict().items())
    assert len(ours.state_dict()) == len(state)


# -- the command -------------------------------------------------------------------------------------------


def test_convert_keeps_a_dense_change_and_cuts_it_on_demand(base, tmp_path):
    wanted = saved("ROAD", models.llama(), tmp_path / "a")
    with pytest.raises(FormatError, match="peft_type 'ROAD' opens through PEFT's own merge: veneer convert"):
        veneer.load(models.llama(), tmp_path / "a")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "whole"), to="veneer", model=base)
    assert done.notes == ["6 layers are kept dense"] and done.layers == 6 and done.ranks == []
    assert apart(outputs(veneer.load(models.llama(), tmp_path / "whole")), wanted) < CLOSE
    with pytest.raises(
        FormatError, match="by more than two factors; cut it to a rank, or keep it whole with"
    ):
        convert(str(tmp_path / "a"), out=str(tmp_path / "no"), model=base)
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "cut"), model=base, rank=32)
    assert max(done.ranks) <= 32
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "cut")
    assert apart(outputs(theirs), wanted) < 1e-4


def test_convert_writes_factors_as_plain_lora(base, tmp_path):
    wanted = saved("DELORA", models.llama(), tmp_path / "a")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), model=base)
    assert done.ranks == [4] and done.notes[0] == "PEFT's DELORA is written as plain LoRA"
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "o")
    assert theirs.peft_config["default"].peft_type == "LORA" and apart(outputs(theirs), wanted) < CLOSE


def test_a_change_of_biases_is_not_cut_to_a_rank(base, tmp_path):
    saved("BEFT", models.llama(), tmp_path / "a")
    with pytest.raises(NotMergeable, match="otherwise than by a matrix"):
        convert(str(tmp_path / "a"), out=str(tmp_path / "o"), model=base, rank=8)
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="veneer", model=base)
    assert done.notes == ["6 layers are kept as biases"]


def test_to_veneer_takes_other_kinds_too_and_needs_the_base(base, tmp_path):
    wanted = saved("MISS", models.llama(), tmp_path / "a")
    with pytest.raises(ConfigError, match="to='veneer' opens the adapter on its base; give model"):
        convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="veneer")
    done = convert(str(tmp_path / "a"), out=str(tmp_path / "o"), to="veneer", model=base)
    assert done.notes == [] and done.layers == 6
    assert apart(outputs(veneer.load(models.llama(), tmp_path / "o")), wanted) < CLOSE


def test_the_task_of_poly_is_asked_for(base, tmp_path):
    saved("POLY", models.llama(), tmp_path / "a")
    for task in (None, 2, -1):
        with pytest.raises(ConfigError, match="poly_task must be a number from 0 to 1 for PEFT's POLY, got"):
            convert(str(tmp_path / "a"), out=str(tmp_path / "o"), model=base, poly_task=task)
    saved("C3A", models.llama(), tmp_path / "b")
    with pytest.raises(ConfigError, match="poly_task is for PEFT's POLY; this is C3A"):
        opening.to_changes(models.llama(), tmp_path / "b", 0)


# -- refused -----------------------------------------------------------------------------------------------


def edited(folder: Path, **settings) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("peft_type", "settings", "text"),
    [
        ("C3A", {"bias": "all"}, "bias='all': the base's biases were trained too; merge it in PEFT"),
        ("PVERA", {"save_projection": False}, "another machine's draw cannot be repeated"),
        ("C3A", {"target_parameters": ["w"]}, "target_parameters change more than the targeted layers"),
        ("C3A", {"brand_new": 1}, "cannot open this C3A on this base: it has no settings brand_new"),
        ("C3A", {"block_size": 7}, "cannot open this C3A on this base:"),
    ],
)
def test_settings_that_ask_for_more_are_refused(peft_type, settings, text, tmp_path):
    saved(peft_type, models.llama(), tmp_path / "a")
    ours = models.llama()
    with pytest.raises(FormatError) as refused:
        opening.to_changes(ours, edited(tmp_path / "a", **settings))
    assert text in str(refused.value)
    assert not any("peft" in type(m).__module__ for m in ours.modules())


def test_missing_and_foreign_tensors_are_refused(tmp_path):
    saved("C3A", models.llama(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(sorted(tensors)))
    save_file({n: t for n, t in tensors.items() if n != first}, file)
    with pytest.raises(FormatError, match=f"missing: {first}"):
        opening.to_changes(models.llama(), tmp_path / "a")
    save_file({**tensors, "base_model.model.model.other.c3a_kernel": torch.ones(1)}, file)
    with pytest.raises(FormatError, match="tensors that belong to no layer: "):
        opening.to_changes(models.llama(), tmp_path / "a")
    save_file({n: t[:1].clone() for n, t in tensors.items()}, file)
    with pytest.raises(FormatError, match="cannot open this C3A on this base"):
        opening.to_changes(models.llama(), tmp_path / "a")


def test_whole_modules_come_along_and_another_embedding_is_refused(tmp_path):
    wanted = saved("C3A", models.llama(), tmp_path / "a", modules_to_save=["lm_head"])
    ours = models.llama()
    hooks.hang(ours, "default", opening.to_changes(ours, tmp_path / "a"))
    assert {type(d).__name__ for _, d in changes(ours, "default")} == {"Dense", "Full"}
    assert apart(outputs(ours), wanted) < CLOSE
    saved("C3A", models.llama(), tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    key, own = "base_model.model.model.embed_tokens.weight", models.llama().model.embed_tokens.weight.detach()
    save_file({**load_file(file), key: own.clone()}, file)
    assert len(opening.to_changes(models.llama(), tmp_path / "b")) == 6
    save_file({**load_file(file), key: own + 1}, file)
    with pytest.raises(FormatError, match=r"embed_tokens.weight in the file is another than the base's"):
        opening.to_changes(models.llama(), tmp_path / "b")


def test_without_peft_the_way_out_is_named(tmp_path, monkeypatch):
    saved("C3A", models.llama(), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'veneer\[peft\]'"):
        opening.to_changes(models.llama(), tmp_path / "a")


def test_a_merge_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    saved("DELORA", models.llama(), tmp_path / "a")
    from peft.tuners.delora.layer import DeloraLinear

    merge = DeloraLinear.merge

    def wrong(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().weight.data[0] += 1

    monkeypatch.setattr(DeloraLinear, "merge", wrong)
    with pytest.raises(FormatError, match=r"PEFT's own merge changes the outputs by .* of their size"):
        opening.to_changes(models.llama(), tmp_path / "a")


# -- layouts -----------------------------------------------------------------------------------------------


def test_the_smallest_layout_without_loss_is_chosen():
    torch.manual_seed(0)
    site = site_for("x", nn.Linear(60, 40))
    B, A = torch.randn(40, 3).double(), torch.randn(3, 60).double()
    low = holding.holding(site, B @ A)
    assert isinstance(low, LoRA) and len(low.A) == 3
    D = torch.zeros(40, 60).double()
    D[torch.arange(20), 2 * torch.arange(20)] = 1.5
    sparse = holding.holding(site, D)
    assert type(sparse).__name__ == "SHiRA" and torch.equal(sparse.delta(site).double(), D)
    full = torch.randn(40, 60).double()
    assert type(holding.holding(site, full)).__name__ == "Dense"
    for share, kind in ((0.3, "SHiRA"), (0.4, "Dense")):  # a number with its place takes that of three
        some = torch.zeros(2400).double()
        places = torch.randperm(2400, generator=torch.Generator().manual_seed(1))[: int(2400 * share)]
        some[places] = torch.randn(len(places)).double()
        found = holding.holding(site, some.view(40, 60))
        assert type(found).__name__ == kind
        torch.testing.assert_close(found.delta(site).double(), some.view(40, 60), rtol=1e-6, atol=1e-6)
    assert type(holding.holding(site, B @ A + 1e-8 * full)).__name__ == "Dense"  # a loss of 1e-8 is a loss
    zero = holding.holding(site, torch.zeros(40, 60).double())
    assert isinstance(zero, LoRA) and not zero.delta(site).any()


def test_a_weight_and_a_bias_are_kept_together(tmp_path):
    """GLORA on layers with biases: gpt2's are Conv1D, which it refuses, so BERT's."""
    import peft as library

    torch.manual_seed(0)
    config = library.GloraConfig(target_modules=["query", "value"], task_type="SEQ_CLS")
    theirs = library.get_peft_model(models.bert(), config).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "glora" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))
    theirs.save_pretrained(tmp_path / "a")
    ours = models.bert()
    hooks.hang(ours, "default", opening.to_changes(ours, tmp_path / "a"))
    assert sum(isinstance(d, Biased) for _, d in changes(ours, "default")) == 4
    expected = models.output(theirs)
    torch.testing.assert_close(models.output(ours), expected, rtol=1e-5, atol=1e-5)
    veneer.save(ours, tmp_path / "b")
    again = veneer.load(models.bert(), tmp_path / "b")
    torch.testing.assert_close(models.output(again), expected, rtol=1e-5, atol=1e-5)


def test_convolutions_and_embeddings_merge_in_their_own_form():
    """OFT by PEFT's merge: the layer's own delta does not matter here, only the shapes."""
    for build, to in ((models.conv_net, ["first", "second"]), (models.llama, ["embed_tokens"])):
        theirs = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=to)).eval()
        models_of = dict(theirs.base_model.model.named_modules())
        with torch.no_grad():
            for n, p in theirs.named_parameters():
                if "lora_" in n:
                    p.add_(0.3 * torch.randn(p.shape))
        ours = build()
        found = [
            c
            for name in models_of
            if name.endswith(tuple(to)) and hasattr(models_of[name], "merge")
            for c in layers.of_layer(name, models_of[name])
        ]
        real = [(site_for(s.name, ours.get_submodule(s.name)), d) for s, d in found]
        hooks.hang(ours, "default", real)
        torch.testing.assert_close(models.output(ours), models.output(theirs), rtol=1e-5, atol=1e-5)
