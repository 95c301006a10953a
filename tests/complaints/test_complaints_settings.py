"""Complaints about settings that were not what they seemed (docs/complaints.md), each test named after the
thread it answers."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models, tiny
from torch import Tensor, nn

import veneer
from veneer import optim
from veneer.adapt import combine
from veneer.adapt.attached import adapters, changes
from veneer.cli.frame import main
from veneer.convert import read, write
from veneer.convert.pairs import Pair, Pairs, take_part
from veneer.data.pack import collate, pack, segments
from veneer.data.tokens import Tokens
from veneer.errors import DataError, SiteError
from veneer.optim.base import groups
from veneer.runs.fit import fit
from veneer.tasks.text import next_token
from veneer.train.run import Run

TENSORS = "adapter_model.safetensors"
CLOSE = dict(rtol=0, atol=2e-5)


def dense(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """W' - W by layer."""
    return {site.name: delta.delta(site).detach() for site, delta in changes(model, name)}


def test_peft_1959_names_that_match_no_layer_are_refused_with_the_nearest():
    with pytest.raises(SiteError) as e:
        veneer.attach(models.llama(), "lora", to=["q_proj", "o_prj", "in_proj"])
    assert "no layer is called 'o_prj'; did you mean 'o_proj'?" in str(
        e.value
    ) and "no layer is called 'in_proj'" in str(e.value)


@pytest.mark.parametrize("tied", [False, True])
def test_unsloth_9331_head_and_embedding_get_gradients_where_they_are_adapted(tied):
    """The loss takes a way of its own around the head; its adapter must be on it."""
    model = models.llama(tie_word_embeddings=tied).train()
    veneer.attach(model, "lora", to=["lm_head", "embed_tokens"], rank=2, untie=tied)
    models.randomise(model)
    ids = torch.randint(0, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    next_token.loss(model, {"input_ids": ids, "labels": ids.clone()})[0].backward()
    norms = {
        f"{site.name}.{n}": float(p.grad.norm())
        for site, d in changes(model, "default")
        for n, p in d.named_parameters()
    }
    assert len(norms) == 4 and all(n > 0 for n in norms.values()), norms


def test_unsloth_6936_experts_that_are_no_layers_are_adapted_and_not_left_frozen():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=31, num_local_experts=2, num_experts_per_tok=1, **sizes)
    )
    assert model.model.layers[0].mlp.experts.gate_up_proj.ndim == 3
    with pytest.raises(SiteError, match=r"no layer is called 'gate_proj'"):
        veneer.attach(model, "lora", to=["q_proj", "gate_proj"], rank=2)
    veneer.attach(model, "lora", to=["q_proj", "experts"], rank=2)
    model(torch.arange(8)[None]).logits.square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (1 + 2 * 2)
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if n in trained and n.endswith("B"))


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_lerobot_3551_alpha_follows_the_rank_and_the_scale_is_said(tmp_path, rank, capsys):
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=rank)
    assert {delta.scaling for _, delta in changes(model, "default")} == {2.0}
    if rank == 8:
        fit(Run.from_dict(tiny.settings(tmp_path, steps=1, options={"rank": rank})))
        assert "; scale 2; lr 0.01" in capsys.readouterr().err


def test_mlx_vlm_841_the_change_is_alpha_over_r_times_B_A():
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=4, alpha=12.0)
    models.randomise(model)
    for site, delta in changes(model, "default"):
        by_hand = 12 / 4 * delta.B.detach().double() @ delta.A.detach().double()
        torch.testing.assert_close(dense(model)[site.name].double(), by_hand, rtol=1e-5, atol=1e-6)


def test_mlx_vlm_841_mlx_gets_the_scale_and_not_alpha(tmp_path):
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=4, alpha=12.0)
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    write(read(tmp_path / "a"), tmp_path / "mlx", "mlx")
    assert (
        json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 3.0
    )


def test_axolotl_4010_loraplus_decays_what_it_is_told_to():
    found = groups.of_adapter(veneer.attach(models.llama(), "lora", to=["q_proj"], rank=2), "default")
    moved = [p.parameter for p in found]
    optimiser = optim.make("loraplus", ratio=4.0).build(optim.Trained(found, (0.9, 0.999), 1.0))
    before = [p.detach().clone() for p in moved]
    for p in moved:
        p.grad = torch.zeros_like(p)  # nothing but the decay moves it
    groups.set_rates(optimiser, 0.1, 0.5)
    optimiser.step()
    A, B = (next(i for i, p in enumerate(found) if p.role == role) for role in "AB")
    product = (1 - 0.1 * 0.5) ** 0.5  # each factor takes half of what the product loses at A's rate
    assert float(moved[A].detach().norm() / before[A].norm()) == pytest.approx(product, rel=1e-4)
    assert B != A and {g["weight_decay"] for g in optimiser.param_groups} != {0.0}


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"stabilised": True}), ("dora", {}), ("lora", {"init": "pissa"})]
)
def test_peft_3761_a_combination_is_the_sum_of_the_changes(method, options):
    model = models.llama()
    veneer.attach(model, method, to=["q_proj", "v_proj"], rank=3, name="a", **options)
    veneer.attach(model, "lora", to=["q_proj"], rank=2, name="b")
    for seed, name in enumerate("ab"):
        models.randomise(model, name, seed=seed)
    combine.combine(model, {"a": 0.5, "b": 0.5}, "both", rank=16)
    a, b, both = (dense(model, n) for n in ("a", "b", "both"))
    for name, D in both.items():
        U, S, V = torch.linalg.svd((0.5 * a[name] + 0.5 * b.get(name, torch.zeros(()))).double())
        best = (U[:, :16] * S[:16]) @ V[:16]
        assert float((D.double() - best).norm() / S.norm()) < 1e-6, name


def test_peft_2733_the_strength_of_rslora_is_a_share_of_its_own_change():
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=4, stabilised=True)
    models.randomise(model)
    for site, delta in changes(model, "default"):
        x = torch.randn(3, site.in_, generator=torch.Generator().manual_seed(0))
        with veneer.using(model):
            base = site.module(x)
        with veneer.using(model, {"default": 0.5}):
            half = site.module(x) - base
        torch.testing.assert_close(half, 0.5 * x @ delta.delta(site).mT, **CLOSE)


def test_peft_2733_what_is_exported_to_vllm_has_the_scale_in_its_numbers(tmp_path):
    model = veneer.attach(models.llama(), "lora", to=["q_proj"], rank=4, stabilised=True)
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    write(read(tmp_path / "a"), tmp_path / "vllm", "vllm")
    config, tensors = (
        json.loads((tmp_path / "vllm" / "adapter_config.json").read_text()),
        load_file(tmp_path / "vllm" / TENSORS),
    )
    assert config["lora_alpha"] == config["r"] and not config.get("use_rslora")
    for name, D in dense(model).items():
        B, A = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "BA")
        torch.testing.assert_close(B @ A, D, **CLOSE)


def test_diffusers_14409_mixed_ranks_do_not_depend_on_the_order_of_names(tmp_path):
    def factors(rank: int) -> Pair:
        return Pair(torch.randn(rank, 8), torch.randn(8, rank), 2.0)

    torch.manual_seed(0)
    pairs = take_part(
        Pairs({"blocks.0.to_q": factors(2), "blocks.0.to_k": factors(8), "blocks.1.to_q": factors(4)}), "unet"
    )
    write(pairs, tmp_path / "x", "diffusers")
    (file,) = (tmp_path / "x").glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    for n, order in enumerate((sorted(tensors), sorted(tensors, reverse=True))):
        save_file({k: tensors[k] for k in order}, tmp_path / f"{n}.safetensors", header)
        again = read(tmp_path / f"{n}.safetensors")
        for name, pair in pairs.sites.items():
            torch.testing.assert_close(again.sites[name].product(), pair.product())


def test_peft_3229_all_linear_is_no_set_of_letters(tmp_path):
    model = veneer.attach(models.llama(), "lora", to="all-linear", rank=2)
    assert len(changes(model, "default")) == 14
    models.randomise(model)
    veneer.save(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    with pytest.raises(
        SiteError,
        match=r"no layer matches to='q-proj'; the model has e.g. model.embed_tokens, model.layers.0",
    ):
        veneer.attach(models.llama(), "lora", to="q-proj")
    assert Run.from_dict({"data": "x.txt", "to": "all-linear"}).to == "all-linear"


def test_trl_6668_rows_without_a_label_stop_the_run_before_its_first_step(tmp_path, capsys):
    given = tiny.settings(tmp_path)
    data = tiny.jsonl(
        tmp_path / "masked.jsonl", *({"prompt": f"why {i}", "completion": ""} for i in range(20))
    )
    with pytest.raises(DataError):
        fit(Run.from_dict({**given, "data": str(data)}), progress=False)
    assert not (tmp_path / "run").exists()
    assert main(["data", "check", str(data), "--model", given["model"], "--valid", given["valid"]]) != 0
    out, err = capsys.readouterr()
    assert "masked.jsonl" in out + err


def texts(*lengths: int) -> list[Tokens]:
    draw = torch.Generator().manual_seed(0)
    return [
        Tokens(
            torch.randint(models.VOCABULARY, (n,), generator=draw),
            torch.ones(n, dtype=torch.bool),
            torch.ones(n),
        )
        for n in lengths
    ]


@torch.no_grad()
def test_axolotl_3453_packing_changes_no_loss():
    model = models.llama().double()
    found = [s for t in texts(9, 5, 14, 2) for s in segments(t, 30)]
    (window,) = pack(found, 30)
    together, n = next_token.loss(model, collate([window], 0))
    apart = sum(float(next_token.loss(model, collate([(s,)], 0))[0]) for s in found)
    assert n == 26 and float(together) == pytest.approx(apart, rel=1e-10) and apart > 26


@torch.no_grad()
def test_unsloth_126_a_packed_text_sees_no_other():
    model = models.llama().double()
    first, other, second = (segments(t, 30)[0] for t in texts(9, 9, 7))
    logits = [
        model(**{k: v for k, v in collate([(s, second)], 0).items() if k != "labels"}, use_cache=False).logits
        for s in (first, other)
    ]
    torch.testing.assert_close(logits[0][:, 8:], logits[1][:, 8:], rtol=0, atol=1e-12)
    assert (logits[0][:, :8] - logits[1][:, :8]).abs().max() > 0.1


def test_lerobot_3551_pefts_own_scale_is_kept_when_its_adapters_are_read(tmp_path):
    """The scale of PEFT's default, alpha 8 whatever the rank, is kept as it is when such an adapter is
    read."""
    theirs = peft.get_peft_model(
        models.llama(), peft.LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "a")
    model = veneer.load(models.llama(), tmp_path / "a")
    assert adapters(model) == ["default"] and {d.scaling for _, d in changes(model, "default")} == {0.5}
    torch.testing.assert_close(models.output(model), models.output(theirs.eval()), **CLOSE)
