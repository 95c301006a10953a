"""Files written by other programs, and ours read by them: where the other program is installed."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support import models
from torch import nn

from veneer.adapt.attach import attach, detach
from veneer.adapt.store import store
from veneer.convert import Base, read, write
from veneer.convert.base import of_model
from veneer.convert.pairs import take_part

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CLOSE = dict(rtol=0, atol=2e-5)  # logits of size 4 through two layers in float32


def spread(parameters, size: float = 0.1, seed: int = 3) -> None:
    """A random step for every parameter."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=draw).to(p))


def through_peft(model: nn.Module, pairs, folder) -> torch.Tensor:
    """The model's output with the pairs, by way of PEFT's folder and our own loader."""
    write(pairs, folder, "peft", base=of_model(model))
    store.load(model, folder, "read")
    try:
        return models.output(model)
    finally:
        detach(model, "read")


def adapted(model: nn.Module, method: str, folder, **options) -> torch.Tensor:
    """Saves a random adapter of ours in `folder`, and the output with it."""
    attach(model, method, **{"to": ALL, "rank": 4, "alpha": 8, **options})
    models.randomise(model)
    want = models.output(model)
    store.save(model, folder)
    detach(model)
    return want


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_a_folder_of_peft(tmp_path, settings):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        models.llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL, **settings)
    )
    spread(p for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.save_pretrained(tmp_path / "theirs")
    want = models.output(wrapped)
    torch.testing.assert_close(
        through_peft(models.llama(), read(tmp_path / "theirs"), tmp_path / "ours"), want, **CLOSE
    )


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_convolutions_of_peft(tmp_path, settings):
    peft = pytest.importorskip("peft")
    layers = ["first", "second", "line", "head"]
    wrapped = peft.get_peft_model(
        models.conv_net(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers, **settings)
    )
    spread(p for n, p in wrapped.named_parameters() if "lora_" in n)
    wrapped.save_pretrained(tmp_path / "theirs")
    want = models.output(wrapped)
    torch.testing.assert_close(
        through_peft(models.conv_net(), read(tmp_path / "theirs"), tmp_path / "ours"), want, **CLOSE
    )


@pytest.mark.parametrize(("method", "dialect"), [("lora", "peft"), ("dora", "peft"), ("lora", "vllm")])
def test_peft_reads_ours(tmp_path, method, dialect, recwarn):
    peft = pytest.importorskip("peft")
    want = adapted(
        models.llama(), method, tmp_path / "ours", rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}
    )
    write(read(tmp_path / "ours"), tmp_path / "theirs", dialect)
    torch.testing.assert_close(
        models.output(peft.PeftModel.from_pretrained(models.llama(), tmp_path / "theirs").eval()),
        want,
        **CLOSE,
    )
    assert [str(w.message) for w in recwarn if "adapter" in str(w.message)] == []


@pytest.mark.parametrize("dora", [False, True])
def test_lycoris_both_ways(tmp_path, dora):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_name": ["*_proj"], "use_fnmatch": True})
    model = models.llama()
    theirs = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, algo="lora", dora_wd=dora)
    theirs.apply_to()
    spread(theirs.parameters())
    theirs.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    want = models.output(model)
    pairs = read(tmp_path / "theirs.safetensors", base=of_model(models.llama()))
    assert all(p.scaling == 0.5 and (p.magnitude is not None) == dora for p in pairs.sites.values())
    torch.testing.assert_close(through_peft(models.llama(), pairs, tmp_path / "peft"), want, **CLOSE)

    write(pairs, tmp_path / "ours", "kohya")
    other = models.llama()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "ours" / "lora.safetensors"), other)
    network.apply_to()
    torch.testing.assert_close(models.output(other), want, **CLOSE)


@pytest.mark.parametrize("tucker", [False, True])
def test_lycoris_convolutions(tmp_path, tucker):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_name": ["first", "second", "head"], "use_fnmatch": True})
    model = models.conv_net()
    settings = dict(linear_dim=2, linear_alpha=2, conv_dim=2, conv_alpha=1, algo="lora", use_tucker=tucker)
    theirs = lycoris.create_lycoris(model, 1.0, **settings)
    theirs.apply_to()
    spread(theirs.parameters())
    theirs.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    pairs = read(tmp_path / "theirs.safetensors", base=of_model(models.conv_net()))
    torch.testing.assert_close(
        through_peft(models.conv_net(), pairs, tmp_path / "peft"), models.output(model), **CLOSE
    )


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


@torch.no_grad()
def painted(model: nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, c = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 8, generator=draw)
    return model(x, 5, c).sample


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"rank_pattern": {"to_q": 2}}])
def test_diffusers_both_ways(tmp_path, settings):
    model = unet()
    import diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    targets = ["to_q", "to_v", "conv1"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets, **settings))
    spread(p for n, p in model.named_parameters() if "lora_" in n)
    want = painted(model)
    metadata = model.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=metadata,
    )
    pairs = read(tmp_path / "theirs")
    assert pairs.parts == ("unet",)
    write(pairs, tmp_path / "ours", "diffusers")
    other = unet()
    other.load_lora_adapter(tmp_path / "ours", prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(painted(other), want, **CLOSE)
    write(take_part(pairs, "unet"), tmp_path / "peft", "peft")
    bare = unet()
    store.load(bare, tmp_path / "peft")
    torch.testing.assert_close(painted(bare), want, **CLOSE)

    write(pairs, tmp_path / "kohya", "kohya")
    back = read(
        tmp_path / "kohya", base=Base(names=tuple(f"unet.{n}" for n, _ in unet().named_modules() if n))
    )
    assert set(back.sites) == set(pairs.sites)
    third = unet()
    sites = {n.removeprefix("unet."): p for n, p in back.sites.items()}
    assert all(n in dict(third.named_modules()) for n in sites)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_both_ways(tmp_path, kind):
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    models.llama().save_pretrained(tmp_path / "base")
    ids = models.inputs(models.llama())["input_ids"]

    def logits(model):
        return torch.tensor(model(mx.array(ids.tolist())).tolist())

    theirs, _ = load_model(tmp_path / "base")
    torch.testing.assert_close(logits(theirs), models.output(models.llama()), **CLOSE)
    theirs.freeze()
    settings = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": [f"self_attn.{n}" for n in ATTENTION]}
    linear_to_lora_layers(theirs, 1, settings, use_dora=kind == "dora")
    mx.random.seed(1)
    trained = {k: v + 0.1 * mx.random.normal(v.shape) for k, v in tree_flatten(theirs.trainable_parameters())}
    theirs.load_weights(list(trained.items()), strict=False)
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), trained)
    config = {
        "model": "x",
        "fine_tune_type": kind,
        "num_layers": 1,
        "lora_parameters": settings,
        "batch_size": 4,
    }
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    pairs = read(tmp_path / "theirs")
    assert {n.split(".")[2] for n in pairs.sites} == {"1"}  # the last of two layers
    torch.testing.assert_close(
        through_peft(models.llama(), pairs, tmp_path / "peft"), logits(theirs), **CLOSE
    )

    want = adapted(models.llama(), kind, tmp_path / "own", to=ALL, rank_pattern={"q_proj": 2})
    write(read(tmp_path / "own"), tmp_path / "ours", "mlx", base=of_model(models.llama()))
    other, _ = load_model(tmp_path / "base")
    load_adapters(other, str(tmp_path / "ours"))
    torch.testing.assert_close(logits(other), want, **CLOSE)


def lit_config(litgpt_lora, **lora):
    c = models.llama().config
    return litgpt_lora.Config(
        name="tiny",
        block_size=64,
        padded_vocab_size=c.vocab_size,
        vocab_size=c.vocab_size,
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=32,
        intermediate_size=48,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=c.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        **lora,
    )


@pytest.mark.parametrize(
    "on", [("query", "value"), ("query", "key", "value"), ("key", "projection", "mlp", "head")]
)
def test_litgpt_both_ways(tmp_path, on):
    yaml = pytest.importorskip("yaml")
    lora = pytest.importorskip("litgpt.lora")
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import save_config

    flags = {"lora_r": 4, "lora_alpha": 6, **{f"lora_{w}": True for w in on}}
    config = lit_config(lora, **flags)
    base: dict = {}
    copy_weights_hf_llama(config, {}, base, models.llama().state_dict())
    model = lora.GPT(config).eval()
    model.load_state_dict(base, strict=False)
    spread(p for n, p in model.named_parameters() if "lora_" in n)
    ids = models.inputs(models.llama())["input_ids"]
    with torch.no_grad():
        want = model(ids)
    (tmp_path / "theirs").mkdir()
    torch.save(
        {"model": {k: v for k, v in model.state_dict().items() if "lora_" in k}},
        tmp_path / "theirs" / "lit_model.pth.lora",
    )
    save_config(config, tmp_path / "theirs")
    switches = {f"lora_{w}": w in on for w in ("query", "key", "value", "projection", "mlp", "head")}
    (tmp_path / "theirs" / "hyperparameters.yaml").write_text(
        yaml.safe_dump({**flags, **switches, "lora_dropout": 0.0, "checkpoint_dir": "x"})
    )
    pairs = read(tmp_path / "theirs")
    torch.testing.assert_close(through_peft(models.llama(), pairs, tmp_path / "peft"), want, **CLOSE)

    write(pairs, tmp_path / "ours", "litgpt", base=of_model(models.llama()))
    settings = yaml.safe_load((tmp_path / "ours" / "hyperparameters.yaml").read_text())
    other = lora.GPT(lit_config(lora, **{k: v for k, v in settings.items() if k.startswith("lora_")})).eval()
    base.update(torch.load(tmp_path / "ours" / "lit_model.pth.lora", weights_only=True)["model"])
    other.load_state_dict(base, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(other(ids), want, **CLOSE)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.skipif(sys.platform == "win32", reason="torchtune is not built for it")
def test_torchtune_both_ways(tmp_path, dora):
    pytest.importorskip("torchtune")
    from torchtune.models.convert_weights import hf_to_tune, tune_to_peft_adapter_weights
    from torchtune.models.llama2._component_builders import lora_llama2
    from torchtune.modules.peft import get_adapter_params

    c = models.llama().config
    sizes = dict(
        vocab_size=c.vocab_size,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        intermediate_dim=48,
        max_seq_len=64,
    )

    def build():
        torch.manual_seed(0)
        model = lora_llama2(
            ATTENTION[:3] + ["output_proj"],
            apply_lora_to_mlp=True,
            **sizes,
            norm_eps=c.rms_norm_eps,
            lora_rank=4,
            lora_alpha=6,
            use_dora=dora,
        ).eval()
        model.load_state_dict(
            hf_to_tune(models.llama().state_dict(), num_heads=4, num_kv_heads=2, dim=32), strict=False
        )
        for m in model.modules():
            if dora and hasattr(m, "initialize_dora_magnitude"):
                m.initialize_dora_magnitude()
        return model

    model = build()
    spread(get_adapter_params(model).values())
    ids = models.inputs(models.llama())["input_ids"]
    with torch.no_grad():
        want = model(ids)
    native = {k: v.detach().clone() for k, v in get_adapter_params(model).items()}
    (tmp_path / "theirs").mkdir()
    torch.save(native, tmp_path / "theirs" / "adapter_model.pt")
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"],
    }
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    models.llama().config.to_json_file(tmp_path / "theirs" / "config.json")
    pairs = read(tmp_path / "theirs")
    torch.testing.assert_close(through_peft(models.llama(), pairs, tmp_path / "peft"), want, **CLOSE)

    if not dora:  # its export leaves magnitudes unturned
        from safetensors.torch import save_file

        exported = tune_to_peft_adapter_weights({**native}, num_heads=4, num_kv_heads=2, dim=32)
        (tmp_path / "export").mkdir()
        save_file(
            {k: v.contiguous() for k, v in exported.items()},
            tmp_path / "export" / "adapter_model.safetensors",
        )
        (tmp_path / "export" / "adapter_config.json").write_text(json.dumps(config))
        torch.testing.assert_close(
            through_peft(models.llama(), read(tmp_path / "export"), tmp_path / "peft2"), want, **CLOSE
        )

    from safetensors.torch import load_file

    write(pairs, tmp_path / "ours", "torchtune", base=of_model(models.llama()))
    other = build()
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert set(ours) == set(native)
    other.load_state_dict(ours, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(other(ids), want, **CLOSE)
