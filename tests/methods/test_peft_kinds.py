"""Methods that PEFT has too: same outputs, gradients and files, both ways."""

from __future__ import annotations

from typing import Any, NamedTuple

import peft
import pytest
import torch
from support import models
from support.peer import agrees_with_peft

import veneer
from veneer.methods.loha import PEFT_NAMES as LOHA

OFT = {"Q": "oft_R.*.weight"}
BOFT = {"P": "boft_R", "s": "boft_s"}
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
    "loha": Kind("loha", {"rank": 3, "alpha": 2.0}, peft.LoHaConfig, {"r": 3, "alpha": 2}, LOHA),
    "loha conv": Kind("loha", {"rank": 2}, peft.LoHaConfig, {"r": 2, "alpha": 2}, LOHA, conv=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_same_outputs_gradients_and_files_as_peft(name, tmp_path):
    kind = KINDS[name]
    to, build = (CONV, models.conv_net) if kind.conv else (LINEAR, models.llama)
    config = kind.config(target_modules=to, **kind.settings)
    agrees_with_peft(tmp_path, kind.method, kind.options, to, config, build, names=kind.names)


@pytest.mark.parametrize("name", ["loha"])
def test_ranks_and_alphas_of_single_layers_go_both_ways(name, tmp_path):
    kind = KINDS[name]
    patterns = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 7}}
    config = kind.config(target_modules=LINEAR, **kind.settings, **patterns)
    ours = agrees_with_peft(tmp_path, kind.method, kind.options, LINEAR, config, names=kind.names)
    veneer.save(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "again")
    torch.testing.assert_close(models.output(again), models.output(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [peft.LoHaConfig])
def test_the_core_of_a_convolution_opens_exactly(config, tmp_path):
    theirs = peft.get_peft_model(
        models.conv_net(), config(target_modules=CONV, r=2, alpha=3, use_effective_conv2d=True)
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
