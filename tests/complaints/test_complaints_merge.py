"""Complaints about merging (docs/complaints.md), each test named after the thread it answers."""

from __future__ import annotations

import pytest
import torch
from support import models, tiny
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.merge import foresee, merge
from veneer.analyse.cost.memory import Live
from veneer.errors import NotMergeable, SiteError
from veneer.verbs.export import export
from veneer.verbs.merge import merge as merge_folders


def adapted(dtype: torch.dtype = torch.float32, size: float = 0.1, **options) -> nn.Module:
    model = veneer.attach(models.llama().to(dtype), "lora", rank=2, **options)
    models.randomise(model, size=size)
    return model


class Linear4bit(nn.Linear):
    """As quantisation libraries make them: a Linear by class, whose weight is codes, two a byte."""

    def __init__(self, in_: int, out: int) -> None:
        super().__init__(in_, out, bias=False)
        self.weight = nn.Parameter(torch.zeros(out * in_ // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("size", [0.003, 0.3])
def test_peft_1043_a_merge_into_four_bits_is_refused_or_keeps_the_change(size):
    model = veneer.attach(veneer.quantise(models.llama(), "nf4"), "lora", rank=2)
    models.randomise(model, size=size)
    y, before = models.output(model), {n: t.clone() for n, t in model.state_dict().items()}
    try:
        verdict = merge(model, limit=0.4)
    except NotMergeable as e:
        assert "merge into that (veneer.dequantise)" in str(e) and all(
            torch.equal(t, before[n]) for n, t in model.state_dict().items()
        )
        assert size < 0.1
    else:
        assert verdict.error < 0.4 and models.output(model).shape == y.shape and size > 0.1


def test_peft_1043_weights_packed_in_an_unknown_way_are_refused():
    model = models.llama()
    model.model.layers[0].self_attn.q_proj = Linear4bit(32, 32)
    with pytest.raises(
        SiteError,
        match=r"'model\.layers\.0\.self_attn\.q_proj' is a Linear4bit whose weight is packed"
        r" \(torch\.uint8\)",
    ):
        veneer.attach(model, "lora", to=["q_proj"], rank=2)
    assert not veneer.adapters(model)
    with pytest.warns(UserWarning, match=r"all-linear leaves out 1 of 14 linear layers \(1 packed\)"):
        veneer.attach(model, "lora", rank=2)
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "deltas")


def test_transformers_31293_what_eight_bits_would_leave_is_a_number_beforehand():
    model = adapted(size=0.02)
    rough, fine = (foresee(model, {"default": 1.0}, dtype=d) for d in (torch.float8_e4m3fn, torch.float32))
    assert rough.lost and rough.error > 0.5 and not fine.lost and fine.error < 1e-5


def test_peft_2321_the_refusal_has_numbers_layers_and_what_to_do():
    with pytest.raises(NotMergeable) as e:
        merge(adapted(torch.bfloat16, 1e-6))
    told = str(e.value)
    assert (
        "rounding took 100.0% of the change" in told
        and "14 of 14 layers lost more than 50%, worst model.layers." in told
    )
    assert "keep it as an adapter, merge into a wider dtype (float32), or pass force=True" in told


def test_peft_1388_sums_are_made_in_float32_and_rounded_once():
    model = adapted(torch.bfloat16, 0.03)
    wanted = {
        s.name: (s.weight().double() + d.delta(s).detach().double()).to(torch.bfloat16)
        for s, d in changes(model, "default")
    }
    merge(model, probe={})
    for name, W in wanted.items():
        written = model.get_submodule(name).weight.detach()
        steps = (
            (written.double() - W.double()).abs()
            / torch.finfo(torch.bfloat16).eps
            / W.double().abs().clamp_min(1e-30)
        )
        assert (
            float((steps > 0).double().mean()) < 1e-3 and float(steps.max()) < 1.01
        )  # ties of the float32 sum alone


def test_peft_2502_outputs_before_and_after_are_compared():
    model = adapted(torch.bfloat16, 0.05)
    y = models.output(model)
    with veneer.using(model):
        base = models.output(model)
    inputs = models.inputs(model)
    verdict = merge(model, probe=inputs)
    merged = models.output(model)
    off = float((merged - y).float().norm() / (y - base).float().norm())
    assert verdict.logit_error == pytest.approx(off, rel=0.05) and 0 < off < 0.2
    assert "of its effect on the outputs" in str(verdict)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with its tokenizer, an adapter of it, and one whose change is below bfloat16's steps."""
    root = tmp_path_factory.mktemp("merge")
    tiny.base(root / "base")
    for name, size in {"adapter": 0.1, "faint": 1e-6}.items():
        model = veneer.attach(
            models.llama(vocab_size=len(tiny.tokenizer()), max_position_embeddings=128), "lora", rank=2
        )
        models.randomise(model, size=size)
        veneer.save(model, root / name)
    return root


def test_mlx_lm_1172_a_change_that_rounding_swallows_is_never_written(folder):
    out = folder / "swallowed"
    for verb in (
        merge_folders,
        lambda a, **given: export(given.pop("model"), adapter=a, **{**given, "dtype": "bf16"}),
    ):
        with pytest.raises(
            NotMergeable, match="the adapter would be lost in the merge: LOST: rounding took"
        ) as e:
            verb([str(folder / "faint")], model=str(folder / "base"), out=str(out), dtype="bfloat16")
        assert e.value.exit_code == 3 and not out.exists()


@pytest.mark.parametrize("tied", [False, True])
def test_unsloth_2142_the_folder_that_was_written_does_what_the_adapter_did(tmp_path, tied):
    """Tied: the output head alone is adapted, so that the merged model may not share it with the embedding
    any more."""
    from transformers import AutoModelForCausalLM

    base = tiny.base(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    veneer.attach(model, "lora", to=["lm_head", "q_proj"], rank=2, untie=True)
    models.randomise(model)
    veneer.save(model, tmp_path / "adapter")
    found = export(str(base), adapter=[str(tmp_path / "adapter")], out=str(tmp_path / "out"), dtype="fp32")
    assert found.off is not None and found.off < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(models.output(again), models.output(model), rtol=0, atol=1e-4)


def test_peft_1939_a_merge_takes_the_memory_of_a_few_matrices():
    """Changes are made and written one layer at a time; copies for undoing are kept only where the model
    stays."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(32)))
    veneer.attach(model, "lora", to=[str(i) for i in range(32)], rank=2)
    models.randomise(model)
    one = 4 * 256 * 256
    with Live() as live:
        merge(model, probe={"input": torch.ones(1, 256)}, force=True)
    assert live.made.peak < 8 * one
