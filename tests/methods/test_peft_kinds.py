"""Methods that PEFT has too: same outputs, gradients and files, both ways."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models
from support.peer import agrees_with_peft
from torch import nn

import veneer
from veneer import methods
from veneer.errors import FormatError, ShapeError
from veneer.methods.loha import PEFT_NAMES as LOHA
from veneer.methods.lokr import PEFT_NAMES as LOKR
from veneer.sites import site_for

OFT = {"Q": "oft_R.*.weight"}
BOFT = {"P": "boft_R", "s": "boft_s"}
RANDLORA = {"l": "randlora_lambda", "g": "randlora_gamma"}
LINEAR = ["q_proj", "k_proj", "down_proj"]  # widths 32 -> 32, 32 -> 16 and 48 -> 32
CONV = ["first", "second", "line", "head"]


class Kind(NamedTuple):
    """A method with its options, PEFT's settings of the same, and the names of its parameters there."""

    method: str
    options: dict[str, Any]
    config: type[peft.PeftConfig]
    settings: dict[str, Any]
    names: dict[str, str]
    conv: bool = False
    without: tuple[str, ...] = ()  # layers that PEFT computes otherwise


KINDS = {
    "oft": Kind("oft", {"block": 8, "terms": 5}, peft.OFTConfig, {"oft_block_size": 8}, OFT),
    "oft of 6 terms": Kind(
        "oft", {"block": 8}, peft.OFTConfig, {"oft_block_size": 8, "num_cayley_neumann_terms": 6}, OFT
    ),
    "oft exact": Kind(
        "oft",
        {"block": 16, "terms": 0},
        peft.OFTConfig,
        {"oft_block_size": 16, "use_cayley_neumann": False},
        OFT,
    ),
    "oft shared": Kind(
        "oft",
        {"block": 4, "terms": 5, "shared": True},
        peft.OFTConfig,
        {"oft_block_size": 4, "block_share": True},
        OFT,
    ),
    "boft": Kind("boft", {"block": 8}, peft.BOFTConfig, {"boft_block_size": 8}, BOFT),
    "lokr": Kind("lokr", {"rank": 2, "alpha": 3.0}, peft.LoKrConfig, {"r": 2, "alpha": 3}, LOKR),
    "lokr whole": Kind("lokr", {"rank": 8}, peft.LoKrConfig, {"r": 8, "alpha": 8}, LOKR),
    "lokr of two products": Kind(
        "lokr",
        {"rank": 2, "factor": 8, "both": True},
        peft.LoKrConfig,
        {"r": 2, "alpha": 2, "decompose_factor": 8, "decompose_both": True},
        LOKR,
    ),
    "lokr conv": Kind("lokr", {"rank": 1}, peft.LoKrConfig, {"r": 1, "alpha": 1}, LOKR, conv=True),
    "lokr whole conv": Kind(
        "lokr", {"rank": 5}, peft.LoKrConfig, {"r": 5, "alpha": 5}, LOKR, conv=True, without=("line",)
    ),
    "hra": Kind("hra", {"rank": 4}, peft.HRAConfig, {"r": 4}, {"U": "hra_u"}),
    "hira": Kind("hira", {"rank": 3}, peft.HiraConfig, {"r": 3}, {"A": "hira_A", "B": "hira_B"}),
    "shira": Kind("shira", {"rank": 2}, peft.ShiraConfig, {"r": 2}, {"v": "shira_weight"}),
    "randlora": Kind("randlora", {"rank": 5}, peft.RandLoraConfig, {"r": 5, "randlora_alpha": 100}, RANDLORA),
    "loha": Kind("loha", {"rank": 3, "alpha": 2.0}, peft.LoHaConfig, {"r": 3, "alpha": 2}, LOHA),
    "loha conv": Kind("loha", {"rank": 2}, peft.LoHaConfig, {"r": 2, "alpha": 2}, LOHA, conv=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_same_outputs_gradients_and_files_as_peft(name, tmp_path):
    kind = KINDS[name]
    to, build = (CONV, models.conv_net) if kind.conv else (LINEAR, models.llama)
    to = [n for n in to if n not in kind.without]
    config = kind.config(target_modules=to, **kind.settings)
    agrees_with_peft(tmp_path, kind.method, kind.options, to, config, build, names=kind.names)


@pytest.mark.parametrize("name", ["hira", "randlora"])
def test_transposed_layers_go_both_ways(name, tmp_path):
    kind = KINDS[name]
    options, settings = kind.options, {**kind.settings, "fan_in_fan_out": True}
    if name == "randlora":  # at its default the products are so large that float32 shows in gradients
        options, settings = {**options, "alpha": 5.0}, {**settings, "randlora_alpha": 5}
    to = ["c_attn", "c_proj"]
    config = kind.config(target_modules=to, **settings)
    agrees_with_peft(tmp_path, kind.method, options, to, config, models.gpt2, names=kind.names)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_ranks_and_alphas_of_single_layers_go_both_ways(name, tmp_path):
    kind = KINDS[name]
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 7}}
    config = kind.config(target_modules=LINEAR, **kind.settings, **patterns)
    ours = agrees_with_peft(tmp_path, kind.method, kind.options, LINEAR, config, names=kind.names)
    veneer.save(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "again")
    torch.testing.assert_close(models.output(again), models.output(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_the_core_of_a_convolution_opens_exactly(config, tmp_path):
    to = ["first", "second", "head"]  # PEFT's LoKr fails on the core of a Conv1d
    theirs = peft.get_peft_model(
        models.conv_net(), config(target_modules=to, r=1, alpha=3, use_effective_conv2d=True)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    ours = veneer.load(models.conv_net(), tmp_path)
    expected = models.output(theirs)
    assert not torch.allclose(expected, models.output(models.conv_net()), atol=1e-3)
    torch.testing.assert_close(models.output(ours), expected, rtol=1e-5, atol=1e-5)


def saved_by_peft(folder, config, build=models.llama, size=0.2):
    """A folder that PEFT wrote, with trained numbers moved from their start, and PEFT's model."""
    theirs = peft.get_peft_model(build(), config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=draw))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"oft_block_size": 0, "r": 4},  # blocks by their number
        {"oft_block_size": 12},  # divides no width: PEFT takes another block, layer by layer
        {"oft_block_size": 8, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 8, "num_cayley_neumann_terms": 2},
        {"oft_block_size": 8, "coft": True, "eps": 0.3},
    ],
)
def test_other_forms_of_oft_open_exactly(settings, tmp_path):
    config = peft.OFTConfig(target_modules=LINEAR, **settings)
    theirs = saved_by_peft(tmp_path, config, size=0.05)
    expected = models.output(theirs)
    assert not torch.allclose(expected, models.output(models.llama()), atol=1e-3)
    ours = veneer.load(models.llama(), tmp_path)
    torch.testing.assert_close(models.output(ours), expected, rtol=1e-5, atol=1e-5)


def test_oft_of_an_embedding_goes_both_ways(tmp_path):
    theirs = saved_by_peft(
        tmp_path / "theirs", peft.OFTConfig(target_modules=["embed_tokens"], oft_block_size=8)
    )
    ours = veneer.load(models.llama(), tmp_path / "theirs")
    torch.testing.assert_close(models.output(ours), models.output(theirs), rtol=1e-5, atol=1e-5)
    made = veneer.attach(models.llama(), "oft", to=["embed_tokens"], block=4)
    models.randomise(made)
    veneer.save(made, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours")
    torch.testing.assert_close(models.output(again), models.output(made), rtol=1e-5, atol=1e-5)


def test_lokr_of_a_conv1d_with_a_whole_factor_is_refused_and_kept_in_our_own_layout(tmp_path):
    saved_by_peft(tmp_path / "theirs", peft.LoKrConfig(target_modules=["line"], r=5), models.conv_net)
    with pytest.raises(
        FormatError, match="in another order, which is not LoKr's product; convert the adapter"
    ):
        veneer.load(models.conv_net(), tmp_path / "theirs")
    made = veneer.attach(models.conv_net(), "lokr", to=["line"], rank=5)
    models.randomise(made)
    veneer.save(made, tmp_path / "ours")
    assert (tmp_path / "ours" / "delta.safetensors").is_file()
    again = veneer.load(models.conv_net(), tmp_path / "ours")
    assert torch.equal(models.output(again), models.output(made))


@pytest.mark.parametrize("settings", [{"r": 4, "apply_GS": True, "init_weights": False}, {"r": 3}])
def test_hra_with_orthogonal_columns_and_odd_ranks_open_exactly(settings, tmp_path):
    theirs = saved_by_peft(tmp_path / "theirs", peft.HRAConfig(target_modules=LINEAR, **settings))
    expected = models.output(theirs)
    assert not torch.allclose(expected, models.output(models.llama()), atol=1e-2)
    ours = veneer.load(models.llama(), tmp_path / "theirs")
    torch.testing.assert_close(models.output(ours), expected, rtol=1e-5, atol=1e-5)
    veneer.save(ours, tmp_path / "again")
    again = veneer.load(models.llama(), tmp_path / "again")
    torch.testing.assert_close(models.output(again), expected, rtol=1e-5, atol=1e-5)


def test_hra_of_a_square_convolution_goes_both_ways(tmp_path):
    config = peft.HRAConfig(target_modules=["first"], r=4)
    options, names = {"rank": 4}, {"U": "hra_u"}
    agrees_with_peft(tmp_path, "hra", options, ["first"], config, models.conv_net, names=names)


def test_hra_of_odd_rank_is_refused():
    with pytest.raises(ShapeError, match="rank must be even for hra, got 3; reflections start in pairs"):
        veneer.attach(models.llama(), "hra", rank=3)


@pytest.mark.parametrize("method", ["hira", "hra"])
def test_changes_that_need_w_are_served_by_a_bank(method):
    """HiRA by products with W, HRA by factors."""
    model = veneer.attach(models.llama(), method, rank=4, to=["q_proj", "down_proj"])
    models.randomise(model)
    ids = models.inputs(model)
    alone = models.output(model)
    with veneer.using(model):
        base = models.output(model)
    bank = veneer.bank(model, ["default"])
    bank.use(["default", None])
    y = model(**ids).logits.detach()
    torch.testing.assert_close(y[0], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y[1], base[1], rtol=1e-5, atol=1e-5)


def test_a_file_of_randlora_without_its_bases_is_refused(tmp_path):
    saved_by_peft(tmp_path, peft.RandLoraConfig(target_modules=LINEAR, r=4, save_projection=False))
    with pytest.raises(FormatError, match="randlora_A and randlora_B are missing in the file"):
        veneer.load(models.llama(), tmp_path)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.conv])
def test_a_tensor_cut_short_is_refused(name, tmp_path):
    kind = KINDS[name]
    saved_by_peft(tmp_path, kind.config(target_modules=LINEAR, **kind.settings))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    own = [key for key in tensors if "layers.0.self_attn.k_proj" in key]
    assert own
    for key in own:
        end = 1 if key.endswith("randlora_A") else -1  # which may be wider than the layer needs
        save_file({**tensors, key: tensors[key][..., :end].contiguous()}, file)
        with pytest.raises((FormatError, ShapeError)):
            veneer.load(models.llama(), tmp_path)


def test_as_many_numbers_as_w_has_is_the_most_for_shira():
    with pytest.raises(ShapeError, match=r"rank 20 asks for 1280 numbers, W has 1024 at .*; use at most 16"):
        veneer.attach(models.llama(), "shira", rank=20, to=["q_proj"])
    every = methods.build(methods.get("shira"), site_for("0", nn.Linear(32, 32)), {"rank": 16})
    assert torch.equal(every.places, torch.arange(1024))


def test_lorafa_is_saved_as_lora_and_keeps_no_input(tmp_path):
    model = veneer.attach(models.llama(), "lorafa", rank=4, to=["q_proj"])
    assert [n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad] == ["B"] * 2
    models.randomise(model)
    veneer.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    torch.testing.assert_close(models.output(theirs), models.output(model), rtol=1e-5, atol=1e-5)
    again = veneer.load(models.llama(), tmp_path)
    torch.testing.assert_close(models.output(again), models.output(model), rtol=1e-5, atol=1e-5)


DEFAULTS = {
    "adalora": peft.AdaLoraConfig(total_step=1),
    "bat": peft.MissConfig(),
    "boft": peft.BOFTConfig(),
    "fourierft": peft.FourierFTConfig(),
    "hira": peft.HiraConfig(),
    "hra": peft.HRAConfig(),
    "ia3": peft.IA3Config(),
    "loha": peft.LoHaConfig(),
    "lokr": peft.LoKrConfig(),
    "miss": peft.MissConfig(),
    "oft": peft.OFTConfig(),
    "randlora": peft.RandLoraConfig(),
    "shira": peft.ShiraConfig(),
    "vera": peft.VeraConfig(),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_settings_that_a_file_lacks_have_pefts_defaults(name):
    theirs, ours = DEFAULTS[name].to_dict(), methods.get(name).peft_settings
    assert len(ours) > 2
    assert ours == {k: theirs[k] for k in ours}


def test_every_kind_of_peft_is_among_the_defaults():
    found = {n for n in methods.available() if getattr(methods.get(n), "peft_settings", None)}
    assert found - {"prefix"} <= {*DEFAULTS}


CIRCULAR = {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("name", ["lora", "dora", "lorafa", "loha", "lokr"])
def test_convolutions_that_peft_computes_otherwise_are_not_written_as_its_own(name, rank):
    """PEFT pads a change of a circular convolution with zeros."""
    for layer, kept in ((nn.Conv2d(8, 8, **CIRCULAR), True), (nn.Conv2d(8, 8, 3), False)):
        site = site_for("0", layer)
        form = methods.build(methods.get(name), site, {"rank": rank}).to_peft(site)
        assert (form is None) == kept


@pytest.mark.parametrize("rank", [2, 8])
def test_a_lokr_with_a_whole_factor_of_a_1d_convolution_stays_in_our_own_file(rank):
    for layer, spatial in ((nn.Conv1d(64, 64, 3), 1), (nn.Conv2d(64, 64, 3), 2), (nn.Conv3d(64, 64, 1), 3)):
        site = site_for("0", layer)
        delta = methods.build(methods.get("lokr"), site, {"rank": rank})
        whole = "R" in dict(delta.named_parameters())
        assert whole == (rank == 8)
        assert (delta.to_peft(site) is None) == (spatial == 3 or (spatial == 1 and whole))
