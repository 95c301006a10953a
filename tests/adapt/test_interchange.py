"""Adapters go to PEFT and come from it with the same outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from torch import nn

import veneer
from veneer import methods
from veneer.adapt.attached import changes
from veneer.adapt.peft import settings as peft_settings
from veneer.errors import ConfigError, FormatError

EXACT = dict(rtol=0, atol=1e-5)

# Model -> its builder, layers to adapt, PEFT's task, patterns of ranks and alphas, layers kept whole.
MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(
        build=models.llama,
        to=["q_proj", "v_proj", "down_proj"],
        task="CAUSAL_LM",
        ranks={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 5},
        alphas={"v_proj": 7.5},
        whole=["model.norm", "lm_head"],
        embedding="embed_tokens",
    ),
    "gpt2": dict(
        build=models.gpt2,
        to=["c_attn", "c_proj"],
        task="CAUSAL_LM",
        ranks={"h.0.attn.c_attn": 5},
        alphas={"mlp.c_proj": 1},
        whole=["transformer.ln_f"],
        embedding="wte",
    ),
    "bert": dict(
        build=models.bert,
        to=["query", "value"],
        task="SEQ_CLS",
        ranks={"value": 1},
        alphas={"layer.0.attention.self.query": 9},
        whole=["classifier"],
        embedding="word_embeddings",
    ),
    "conv": dict(
        build=models.conv_net,
        to=["first", "second", "line", "head"],
        task=None,
        ranks={"second": 2, "line": 1},
        alphas={"first": 12},
        whole=[],
        embedding=None,
    ),
}
# Name -> the method with its options here, and the same in PEFT's words.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", dict(alpha=6), dict(lora_alpha=6)),
    "rslora": ("lora", dict(alpha=4, stabilised=True), dict(lora_alpha=4, use_rslora=True)),
    "dora": ("dora", dict(alpha=3), dict(lora_alpha=3, use_dora=True)),
    "pissa": ("lora", dict(alpha=3, init="pissa"), dict(lora_alpha=3, init_lora_weights="pissa")),
    "pissa scaled": ("lora", dict(alpha=5, init="pissa"), dict(lora_alpha=5, init_lora_weights="pissa")),
    "pissa dora": (
        "dora",
        dict(alpha=3, init="pissa"),
        dict(lora_alpha=3, init_lora_weights="pissa", use_dora=True),
    ),
    "pissa rslora": (
        "lora",
        dict(alpha=2, init="pissa", stabilised=True),
        dict(lora_alpha=2, init_lora_weights="pissa", use_rslora=True),
    ),
    "olora": ("lora", dict(alpha=3, init="olora"), dict(lora_alpha=3, init_lora_weights="olora")),
    "olora scaled": ("lora", dict(alpha=4, init="olora"), dict(lora_alpha=4, init_lora_weights="olora")),
}
# Every model with every method; the methods' variants, which do not depend on the kind of layer, on one
# model.
CELLS = [(kind, method) for kind in MODELS for method in ("lora", "rslora", "dora", "pissa", "olora")]
CELLS += [("llama", method) for method in ("pissa scaled", "pissa dora", "pissa rslora", "olora scaled")]


@pytest.fixture(autouse=True)
def keys_are_as_expected() -> Iterator[None]:
    """PEFT warns of keys that it misses, or does not know, with a UserWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def in_peft(build: Any, **config: Any) -> nn.Module:
    """PEFT's model with a trained-looking adapter of rank 3."""
    base = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=3, fan_in_fan_out=build is models.gpt2, **config)
        ).eval()
    return stepped(model)


@torch.no_grad()
def stepped(model: nn.Module, seed: int = 3) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def written(model: nn.Module, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def assert_reads(build: Any, model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Loading what PEFT wrote gives PEFT's outputs, and turning it off gives the base bit for bit."""
    base, ours = models.output(build()), build()
    veneer.load(ours, folder, **options)
    torch.testing.assert_close(models.output(ours), models.output(model), **EXACT)
    assert (models.output(ours) - base).abs().max() > 1e-3
    with veneer.using(ours):
        assert torch.equal(models.output(ours), base)
    return ours


def assert_opens(build: Any, ours: nn.Module, folder: Path) -> nn.Module:
    """PEFT opens what was saved, with our outputs."""
    model = peft.PeftModel.from_pretrained(build(), folder)
    torch.testing.assert_close(models.output(model), models.output(ours), **EXACT)
    return model


@pytest.mark.parametrize(("kind", "method"), CELLS)
def test_peft_opens_ours(kind: str, method: str, tmp_path: Path) -> None:
    spec, (name, options, _) = MODELS[kind], METHODS[method]
    ours = veneer.attach(spec["build"](), name, to=spec["to"], rank=3, **options)
    models.randomise(ours)
    veneer.save(ours, tmp_path)
    assert_opens(spec["build"], ours, tmp_path)


@pytest.mark.parametrize(
    ("kind", "method"), [c for c in CELLS if c not in [("conv", "pissa"), ("conv", "olora")]]
)
def test_ours_opens_pefts(kind: str, method: str, tmp_path: Path) -> None:
    """All but the starts that PEFT does not have for convolutions."""
    spec, (_, _, config) = MODELS[kind], METHODS[method]
    if kind == "gpt2" and "olora" in method:
        spec = {**spec, "to": [r"attn.c_proj"]}  # PEFT's OLoRA fails on a Conv1D that is not square
    model = in_peft(spec["build"], target_modules=spec["to"], task_type=spec["task"], **config)
    ours = assert_reads(spec["build"], model, written(model, tmp_path / "theirs"))
    veneer.save(ours, tmp_path / "again")
    assert_opens(spec["build"], ours, tmp_path / "again")


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((k, "rslora") for k in MODELS), ("llama", "dora"), ("gpt2", "pissa"), ("conv", "dora")],
)
def test_ranks_and_alphas_of_single_layers(kind: str, method: str, tmp_path: Path) -> None:
    spec, (name, options, config) = MODELS[kind], METHODS[method]
    patterns = dict(rank_pattern=spec["ranks"], alpha_pattern=spec["alphas"])
    ours = veneer.attach(spec["build"](), name, to=spec["to"], rank=3, **patterns, **options)
    models.randomise(ours)
    veneer.save(ours, tmp_path / "ours")
    assert_opens(spec["build"], ours, tmp_path / "ours")
    model = in_peft(spec["build"], target_modules=spec["to"], task_type=spec["task"], **patterns, **config)
    assert_reads(spec["build"], model, written(model, tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "lora"), ("llama", "pissa"), ("llama", "dora"), ("gpt2", "rslora"), ("bert", "dora")],
)
def test_embeddings(kind: str, method: str, tmp_path: Path) -> None:
    spec, (name, options, config) = MODELS[kind], METHODS[method]
    targets = [spec["embedding"], *spec["to"]]
    ours = veneer.attach(spec["build"](), name, to=targets, rank=3, **options)
    models.randomise(ours)
    veneer.save(ours, tmp_path / "ours")
    assert not [k for k in load_file(tmp_path / "ours" / peft_settings.TENSORS) if "base_layer" in k]
    assert_opens(spec["build"], ours, tmp_path / "ours")
    model = in_peft(spec["build"], target_modules=targets, task_type=spec["task"], **config)
    written(model, tmp_path / "theirs")
    assert kind != "llama" or [
        k for k in load_file(tmp_path / "theirs" / peft_settings.TENSORS) if "base_layer" in k
    ]
    assert_reads(spec["build"], model, tmp_path / "theirs")


def test_a_tied_embedding_is_adapted_alone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.gpt2(tie_word_embeddings=True)

    model = in_peft(build, target_modules=["wte", "c_fc"], task_type="CAUSAL_LM")
    assert_reads(build, model, written(model, tmp_path))


def test_the_output_head(tmp_path: Path) -> None:
    model = in_peft(models.llama, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    written(model, tmp_path)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / peft_settings.TENSORS)
    assert_reads(models.llama, model, tmp_path)


@pytest.mark.parametrize(("kind", "method"), [("llama", "dora"), ("gpt2", "lora"), ("bert", "lora")])
def test_modules_kept_whole(kind: str, method: str, tmp_path: Path) -> None:
    spec, (_, _, config) = MODELS[kind], METHODS[method]
    save = None if spec["task"] == "SEQ_CLS" else spec["whole"]  # PEFT adds the head of a classifier itself
    model = in_peft(
        spec["build"], target_modules=spec["to"], task_type=spec["task"], modules_to_save=save, **config
    )
    ours = assert_reads(spec["build"], model, written(model, tmp_path / "theirs"))
    assert {s.name for s, _ in changes(ours, "default") if s.kind == "leaf"} == set(spec["whole"])
    veneer.save(ours, tmp_path / "again")
    again = json.loads((tmp_path / "again" / peft_settings.CONFIG).read_text())
    assert again["modules_to_save"] == sorted(spec["whole"]) and again["task_type"] == spec["task"]
    assert_opens(spec["build"], ours, tmp_path / "again")
    assert_reads(spec["build"], model, tmp_path / "again")


def test_a_container_kept_whole(tmp_path: Path) -> None:
    model = in_peft(models.llama, target_modules=["q_proj", "up_proj"], modules_to_save=["layers.1.mlp"])
    ours = assert_reads(models.llama, model, written(model, tmp_path / "theirs"))
    assert sum(s.kind == "leaf" for s, _ in changes(ours, "default")) == 3
    veneer.save(ours, tmp_path / "again")
    assert_opens(models.llama, ours, tmp_path / "again")


@pytest.mark.parametrize(
    "targets",
    [
        dict(target_modules=r".*layers\.\d\.self_attn\.(k|o)_proj"),
        dict(target_modules=["q_proj", "gate_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
        dict(target_modules=["q_proj", "gate_proj"], exclude_modules=r".*layers\.1\..*"),
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
        dict(target_modules=["q_proj", "up_proj"], layers_to_transform=0, layers_pattern="layers"),
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj"], r=40),
        dict(
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"proj": 3, "layers.1": 2, "mlp.up_proj": 4},
            alpha_pattern={"p_proj": 3},
        ),
        dict(target_modules=["q_proj"], lora_dropout=0.3),
    ],
)
def test_pefts_ways_to_name_layers(targets: dict[str, Any], tmp_path: Path) -> None:
    def build() -> nn.Module:
        return models.llama()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stepped(
            peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM", **targets)).eval()
        )
    ours = assert_reads(build, model, written(model, tmp_path / "theirs"))
    veneer.save(ours, tmp_path / "again")
    assert_opens(build, ours, tmp_path / "again")


def test_pefts_four_setting_file_is_enough(tmp_path: Path) -> None:
    model = in_peft(models.llama, target_modules=["q_proj"], lora_alpha=6)
    written(model, tmp_path)
    few = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (tmp_path / peft_settings.CONFIG).write_text(json.dumps(few))
    assert_reads(models.llama, model, tmp_path)
    (tmp_path / peft_settings.CONFIG).write_text(json.dumps({**few, "target_modules": "all-linear"}))
    assert_reads(models.llama, model, tmp_path)


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ([r"layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_the_settings_that_are_written(to: Any, expected: list[str], tmp_path: Path) -> None:
    ours = veneer.attach(models.llama(), to=to, rank=4, alpha=8)
    models.randomise(ours)
    veneer.save(ours, tmp_path)
    text = (tmp_path / peft_settings.CONFIG).read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True)
    assert list(config) == sorted(peft_settings.LONG_KNOWN)  # nothing newer has anything to say
    assert config["target_modules"] == expected
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert isinstance(config["lora_alpha"], int)


def test_the_settings_known_here_are_those_of_peft() -> None:
    theirs = peft.LoraConfig().to_dict()
    assert set(peft_settings.KEYS) == set(theirs)
    odd = {k for k, v in theirs.items() if peft_settings.KEYS[k] != v}
    assert odd == {"inference_mode", "peft_version"}


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("miss", peft.MissConfig),
        ("bat", peft.MissConfig),
        ("ia3", peft.IA3Config),
        ("fourierft", peft.FourierFTConfig),
        ("vera", peft.VeraConfig),
        ("prefix", peft.PrefixTuningConfig),
    ],
)
def test_the_settings_of_other_methods_have_pefts_defaults(method: str, theirs: Any) -> None:
    own, defaults = methods.get(method).peft_settings, theirs().to_dict()
    filled = (
        {"num_transformer_submodules": 1} if method == "prefix" else {}
    )  # which PEFT puts there for a decoder
    assert {**{k: defaults[k] for k in own}, **filled} == own


def test_a_layer_whose_name_ends_another(tmp_path: Path) -> None:
    """`fc` and `block.fc`: PEFT matches by endings, so neither a list of names nor a bare pattern would
    do."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("fc", nn.Linear(6, 6))
        net.add_module("block", nn.Sequential())
        net.block.add_module("fc", nn.Linear(6, 6))
        net.block.add_module("gc", nn.Linear(6, 6))
        return net.eval()

    x = torch.randn(3, 6)
    for to, patterns in (("fc", {}), ("(block.)?[fg]c", {"^fc": 2}), ("(block.)?fc", {"block.fc": 2})):
        ours = veneer.attach(build(), to=to, rank=1, rank_pattern=patterns)
        models.randomise(ours)
        veneer.save(ours, tmp_path)
        model = peft.PeftModel.from_pretrained(build(), tmp_path)
        torch.testing.assert_close(model(x), ours(x), **EXACT)


@pytest.mark.parametrize(
    "layer", [dict(groups=2), dict(dilation=2), dict(padding_mode="circular", padding=1)]
)
def test_convolutions_that_peft_computes_otherwise(layer: dict[str, Any], tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv1d(4, 4, 3, **layer)).eval()

    x = torch.randn(2, 4, 9)
    ours = veneer.attach(build(), to=["0"], rank=2)
    models.randomise(ours)
    veneer.save(ours, tmp_path / "ours", probe={"input": x})
    assert not (tmp_path / "ours" / peft_settings.CONFIG).exists()
    again = veneer.load(build(), tmp_path / "ours")
    assert torch.equal(again(x), ours(x))
    model = in_peft(build, target_modules=["0"]) if "groups" not in layer else None
    if model is not None:
        with pytest.raises(
            FormatError, match="0: PEFT's forward ignores this convolution's groups, dilation or padding mode"
        ):
            veneer.load(build(), written(model, tmp_path / "theirs"))


def initial_and_trained(tmp_path: Path, start: str) -> nn.Module:
    """Writes PEFT's folders `initial`, `trained` and `converted` for a start that moves the base."""
    torch.manual_seed(11)
    model = peft.get_peft_model(
        models.llama(),
        peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=start, target_modules=["q_proj", "up_proj"]),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    stepped(model.eval())
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "trained")
    model.peft_config["default"].init_lora_weights = True  # as PEFT's own recipe says
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    return model


def test_a_random_start_needs_its_initial_or_converted_folder(tmp_path: Path) -> None:
    model = initial_and_trained(tmp_path, "pissa_niter_4")
    assert_reads(models.llama, model, tmp_path / "trained", initial=tmp_path / "initial")
    assert_reads(models.llama, model, tmp_path / "converted")
    with pytest.raises(FormatError) as e:
        veneer.load(models.llama(), tmp_path / "trained")
    assert (
        "init_lora_weights 'pissa_niter_4': its randomised SVD is not seeded, so that the base it was"
        " trained on cannot" in str(e.value)
    )
    assert "Pass initial= with the folder saved before training" in str(e.value)
    assert "path_initial_model_for_weight_conversion" in str(e.value)


def test_a_start_may_have_zeros_in_it(tmp_path: Path) -> None:
    initial_and_trained(tmp_path, "pissa_niter_4")
    for name in ("initial", "trained"):
        path = tmp_path / name / peft_settings.TENSORS
        tensors = load_file(path)
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][:, 5] = 0
        save_file(tensors, path)
    ours = veneer.load(models.llama(), tmp_path / "trained", initial=tmp_path / "initial")
    A, B, A0, B0 = (
        load_file(tmp_path / name / peft_settings.TENSORS)[
            f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"
        ].double()
        for name in ("trained", "initial")
        for x in "AB"
    )
    site, delta = next(
        (s, d) for s, d in changes(ours, "default") if s.name == "model.layers.0.self_attn.q_proj"
    )
    torch.testing.assert_close(delta.delta(site).double(), 5 / 3 * (B @ A - B0 @ A0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "targets", "start"),
    [("llama", ["embed_tokens", "q_proj"], "pissa_niter_2"), ("conv", ["line", "head"], "lora_ga")],
)
def test_layers_without_the_start_stay_plain(
    kind: str, targets: list[str], start: str, tmp_path: Path
) -> None:
    """PEFT starts embeddings as always, and so LoRA-GA starts convolutions."""
    build = MODELS[kind]["build"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=targets, init_lora_weights=start if kind == "llama" else True
        )
        model = peft.get_peft_model(build(), config).eval()
    model.peft_config["default"].init_lora_weights = True
    written(model, tmp_path / "initial")
    stepped(model)
    written(model, tmp_path / "trained")
    path = tmp_path / "trained" / peft_settings.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    ours = assert_reads(build, model, tmp_path / "trained", initial=tmp_path / "initial")
    ranks = {s.name.rsplit(".", 1)[-1]: d.factors(s).A.shape[0] for s, d in changes(ours, "default")}
    assert ranks == ({"embed_tokens": 3, "q_proj": 6} if kind == "llama" else {"line": 3, "head": 3})


def test_an_initial_folder_that_does_not_fit(tmp_path: Path) -> None:
    initial_and_trained(tmp_path, "pissa_niter_4")
    path = tmp_path / "initial" / peft_settings.TENSORS
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, key: torch.zeros(4, 32)}, path)
    with pytest.raises(
        FormatError,
        match=r"q_proj.lora_A.weight is \(4, 32\) in the initial folder, \(3, 32\) in the trained one",
    ):
        veneer.load(models.llama(), tmp_path / "trained", initial=tmp_path / "initial")
    save_file({k: t for k, t in tensors.items() if k != key}, path)
    with pytest.raises(
        FormatError,
        match=r"missing in the initial folder: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
    ):
        veneer.load(models.llama(), tmp_path / "trained", initial=tmp_path / "initial")
    path.unlink()
    with pytest.raises(FormatError, match=r"initial has no adapter_model\.safetensors"):
        veneer.load(models.llama(), tmp_path / "trained", initial=tmp_path / "initial")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            dict(init_lora_weights="corda"),
            "init_lora_weights 'corda': it moves the base by a decomposition over calibration data",
        ),
        (
            dict(init_lora_weights="lora_ga"),
            "init_lora_weights 'lora_ga': it moves the base by a decomposition of gradients",
        ),
        (
            dict(init_lora_weights="loftq"),
            "init_lora_weights 'loftq': it replaces the base by a quantised copy",
        ),
        (
            dict(init_lora_weights="kasa"),
            "init_lora_weights 'kasa': it cuts the smallest singular values off the base",
        ),
        (
            dict(init_lora_weights="zebra"),
            "init_lora_weights 'zebra' is not known here; convert it with PEFT",
        ),
        (
            dict(lora_bias=True),
            "missing: model.layers.0.self_attn.q_proj.lora_B.bias; merge the adapter in PEFT",
        ),
        (
            dict(trainable_token_indices=[1]),
            "missing: model.embed_tokens.token_adapter.trainable_tokens_delta (1, ..)",
        ),
        (
            dict(target_parameters=["w"]),
            "target_parameters names 'w', which no parameter of the model is called",
        ),
        (dict(layer_replication=[[0, 2]]), "layer_replication=[[0, 2]]: the model's layers were repeated"),
        (
            dict(alora_invocation_tokens=[5]),
            "alora_invocation_tokens=[5]: the adapter acts only behind certain tokens (aLoRA)",
        ),
        (dict(arrow_config={"top_k": 1}), "adapters are routed (Arrow)"),
        (dict(kasa_config={"beta": 1}), "the base's smallest singular values were cut off (KaSA)"),
        (dict(monteclora_config={"num_samples": 8}), "the factors are sampled (MonteCLoRA)"),
        (dict(velora_config={"num_groups": 1}), "activations were compressed (VeLoRA)"),
        (dict(use_bdlora={"nblocks": 2}), "the factors are block-diagonal"),
        (dict(use_qalora=True), "the input is pooled in groups (QALoRA)"),
        (dict(megatron_config={"a": 1}), "the layers are Megatron's"),
        (dict(ensure_weight_tying=True), "tied layers share one pair of factors"),
        (
            dict(brand_new=7),
            "brand_new=7: a setting of PEFT that is not known here, and may change what the tensors mean",
        ),
        (dict(target_modules="(q_proj"), "target_modules='(q_proj' is not a regular expression"),
        (dict(peft_type="LILY"), "peft_type 'LILY' cannot be read: its router averages over all tokens"),
        (dict(target_modules=["mlp"]), "'model.layers.0.mlp' is a LlamaMLP, which cannot be adapted here"),
        (
            dict(target_modules=["w_q"]),
            "no layer of the model matches target_modules=['w_q']; it has e.g. model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(
    settings: dict[str, Any], text: str, tmp_path: Path
) -> None:
    model = in_peft(models.llama, target_modules=["q_proj"])
    path = written(model, tmp_path) / peft_settings.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    ours = models.llama()
    with pytest.raises(FormatError) as e:
        veneer.load(ours, tmp_path)
    assert text in str(e.value)
    assert not veneer.adapters(ours)


def test_all_settings_are_refused_at_once(tmp_path: Path) -> None:
    path = written(in_peft(models.llama, target_modules=["q_proj"]), tmp_path) / peft_settings.CONFIG
    path.write_text(
        json.dumps(
            {
                **json.loads(path.read_text()),
                "velora_config": {"a": 1},
                "use_qalora": True,
                "init_lora_weights": "corda",
            }
        )
    )
    with pytest.raises(FormatError) as e:
        veneer.load(models.llama(), tmp_path)
    assert str(e.value).startswith("the adapter cannot be read:\n- ") and str(e.value).count("\n- ") == 3


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica", "gaussian", False])
def test_starts_that_leave_the_base_alone_are_plain(start: Any, tmp_path: Path) -> None:
    model = in_peft(models.llama, target_modules=["q_proj"])
    path = written(model, tmp_path) / peft_settings.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
    assert_reads(models.llama, model, tmp_path)
    with pytest.raises(
        FormatError, match="initial= is for starts that move the base; this adapter's init_lora_weights is"
    ):
        veneer.load(models.llama(), tmp_path, initial=tmp_path)


def test_an_untrained_orthogonal_start_is_no_change(tmp_path: Path) -> None:
    """Its A and B are large and their product is nothing but rounding."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal")
    written(peft.get_peft_model(models.llama(), config), tmp_path)
    with pytest.raises(FormatError, match="the change is zero at 2 of 2 layers"):
        veneer.load(models.llama(), tmp_path)


@pytest.mark.parametrize(
    ("config", "whose"),
    [
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "mlx-lm's"),
        ({"config": {"architecture": "lora"}, "model_type": "bert"}, "the adapters library's"),
        ({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}, "not PEFT's"),
    ],
)
def test_other_programs_files_of_the_same_name(config: dict[str, Any], whose: str, tmp_path: Path) -> None:
    path = written(in_peft(models.llama, target_modules=["q_proj"]), tmp_path) / peft_settings.CONFIG
    path.write_text(json.dumps(config))
    with pytest.raises(
        FormatError,
        match=f"this adapter_config.json is {whose}: it has no peft_type; only PEFT's is read here",
    ):
        veneer.load(models.llama(), tmp_path)


def test_a_resized_vocabulary_is_another_base(tmp_path: Path) -> None:
    model = in_peft(
        lambda: models.llama(vocab_size=99), target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"
    )
    written(model, tmp_path)
    with pytest.raises(FormatError) as e:
        veneer.load(models.llama(), tmp_path)
    assert (
        "wrong shape: model.embed_tokens.lora_embedding_A is (3, 99), the model and the settings ask for (3,"
        " 97)" in str(e.value)
    )
    assert (
        "model.embed_tokens.weight in the file is another than the base's ((99, 32) in the file, (97, 32)"
        " here)" in str(e.value)
    )


def test_an_embedding_of_another_base(tmp_path: Path) -> None:
    model = in_peft(models.llama, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    written(model, tmp_path)
    with pytest.raises(
        FormatError,
        match=r"model\.embed_tokens\.weight in the file is another than the base's: the base is another",
    ):
        veneer.load(models.llama(seed=5), tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_a_copy_of_the_base_in_another_dtype_is_the_base(
    theirs: torch.dtype, ours: torch.dtype, tmp_path: Path
) -> None:
    written(
        in_peft(lambda: models.llama().to(theirs), target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        tmp_path,
    )
    assert any(
        k.endswith("embed_tokens.base_layer.weight") for k in load_file(tmp_path / peft_settings.TENSORS)
    )
    loaded = veneer.load(models.llama().to(ours), tmp_path)
    assert [s.name for s, _ in changes(loaded, "default")] == ["model.embed_tokens"]


def test_a_changed_buffer_of_a_whole_module(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    model = in_peft(build, target_modules=["0"], modules_to_save=["1"])
    ours = veneer.load(build(), written(model, tmp_path / "same"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(ours(x), model(x), **EXACT)
    model.base_model.model[1].modules_to_save["default"].running_mean.add_(1)
    with pytest.raises(FormatError, match=r"1\.running_mean: a buffer of a whole module was changed"):
        veneer.load(build(), written(model, tmp_path / "other"))


def test_a_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    written(in_peft(models.llama, target_modules=["q_proj"]), tmp_path / "french")
    with pytest.raises(FormatError, match="it holds the adapters french: name one of these folders"):
        veneer.load(models.llama(), tmp_path)


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    written(in_peft(models.llama, target_modules=["q_proj"]), tmp_path)
    (tmp_path / peft_settings.TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        FormatError,
        match=r"holds adapter_model.bin and no adapter_model.safetensors; a pickle file can run code",
    ):
        veneer.load(models.llama(), tmp_path)


def test_an_unknown_word_to_allow() -> None:
    with pytest.raises(ConfigError, match=r"allow='unsued' is not known; did you mean 'unused'\?"):
        veneer.load(models.llama(), "nowhere", allow=("unsued",))
