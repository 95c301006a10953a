"""LoHa, LoKr and diag-OFT in files of LyCORIS: against their formulas, to PEFT and back."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import models

import veneer
from veneer.convert.base import Base, of_model
from veneer.convert.lycoris import kohya, turning
from veneer.convert.lycoris import peft as folders
from veneer.convert.lycoris.layers import Layer, Layers
from veneer.errors import ConfigError, FormatError
from veneer.verbs.convert import convert

S, R = 1.5 / 3, 3  # alpha 1.5 at rank 3
Q, DOWN, CONV = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "first"


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flat(name):
    return "lycoris_" + name.replace(".", "_")


def loha(out, in_, r=R):
    return {
        "hada_w1_a": draw(out, r),
        "hada_w1_b": draw(r, in_),
        "hada_w2_a": draw(out, r),
        "hada_w2_b": draw(r, in_),
    }


def lokr(p, k, m, n, r=R):
    return {"lokr_w1": draw(p, m), "lokr_w2_a": draw(k, r), "lokr_w2_b": draw(r, n)}


def written(folder, modules, alpha=1.5):
    tensors = {}
    for name, own in modules.items():
        given = own if alpha is None else {**own, "alpha": torch.tensor(alpha)}
        tensors |= {f"{flat(name)}.{end}": t for end, t in given.items()}
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return str(folder)


def with_weights(deltas):
    """The outputs of the tiny Llama with these changes of its weights."""
    model = models.llama()
    with torch.no_grad():
        for name, D in deltas.items():
            model.get_submodule(name).weight += D
    return models.output(model)


def product(own):
    return (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])


def kron(own):
    w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
    w1 = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    return torch.from_numpy(np.kron(w1.numpy(), w2.numpy()))


CASES = {
    "loha": ({Q: loha(32, 32), DOWN: loha(32, 48)}, product, S),
    "loha of two ranks": ({Q: loha(32, 32), DOWN: loha(32, 48, 2)}, product, None),
    "lokr": ({Q: lokr(4, 8, 4, 8), DOWN: lokr(4, 8, 6, 8)}, kron, S),
    "lokr of factor 8": ({Q: lokr(8, 4, 8, 4, 1), DOWN: lokr(8, 4, 8, 6, 1)}, kron, 1.5),
    "lokr whole": ({Q: {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8)}}, kron, 1.0),  # whatever alpha is
    "lokr of two products": (
        {Q: {"lokr_w1_a": draw(8, 2), "lokr_w1_b": draw(2, 8), "lokr_w2": draw(4, 4)}},
        kron,
        1.5 / 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_opens_with_its_own_numbers_in_peft_and_here_and_goes_back(name, tmp_path, base):
    modules, formula, s = CASES[name]
    source = written(tmp_path / "a", modules)
    done = convert(str(source), out=str(tmp_path / "p"), to="peft", model=base)
    assert done.layers == len(modules) and done.notes == []
    scales = {n: s if s is not None else 1.5 / len(own["hada_w1_b"]) for n, own in modules.items()}
    wanted = with_weights({n: scales[n] * formula(own) for n, own in modules.items()})
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "p")
    torch.testing.assert_close(models.output(theirs), wanted, rtol=1e-4, atol=1e-4)
    ours = veneer.load(models.llama(), tmp_path / "p")
    torch.testing.assert_close(models.output(ours), wanted, rtol=1e-4, atol=1e-4)
    convert(str(tmp_path / "p"), out=str(tmp_path / "b"), to="kohya", model=base)
    again, first = (load_file(f / "lora.safetensors") for f in (tmp_path / "b", source))
    for key, t in first.items():
        if not key.endswith(".alpha"):
            assert torch.equal(again[key], t), key
    read = kohya.read(tmp_path / "b" / "lora.safetensors", of_model(models.llama()))
    assert {n: layer.scaling for n, layer in read.sites.items()} == pytest.approx(scales)


def test_shapes_that_peft_cannot_have_are_refused(tmp_path, base):
    modules = {Q: lokr(8, 4, 8, 4, 1), DOWN: lokr(4, 8, 6, 8, 1)}
    source = written(tmp_path / "a", modules)
    with pytest.raises(
        FormatError, match="PEFT has one rule for the shapes of all layers, which these break"
    ):
        convert(str(source), out=str(tmp_path / "p"), to="peft", model=base)


def test_a_first_product_of_half_the_side_is_whole_in_peft(tmp_path, base):
    """PEFT keeps a matrix whole from a rank of half its larger side on."""
    for rank, fits in ((3, True), (4, False)):
        own = {"lokr_w1_a": draw(8, rank), "lokr_w1_b": draw(rank, 8), "lokr_w2": draw(4, 4)}
        source = written(tmp_path / f"a{rank}", {Q: own})
        if fits:
            convert(str(source), out=str(tmp_path / "p3"), to="peft", model=base)
            theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "p3")
            wanted = with_weights({Q: 1.5 / rank * kron(own)})
            torch.testing.assert_close(models.output(theirs), wanted, rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises(FormatError, match="PEFT has one rule for the shapes of all layers"):
            convert(str(source), out=str(tmp_path / "p4"), to="peft", model=base)


def test_a_wide_second_matrix_stays_whole(tmp_path):
    """k = 2 and n = 8: PEFT compares the rank with the larger one."""
    base = models.llama(num_key_value_heads=1)
    base.save_pretrained(tmp_path / "base")
    K = "model.layers.0.self_attn.k_proj"
    own = {"lokr_w1": draw(4, 4), "lokr_w2": draw(2, 8)}
    source = written(tmp_path / "a", {K: own})
    convert(str(source), out=str(tmp_path / "p"), to="peft", model=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(models.llama(num_key_value_heads=1), tmp_path / "p")
    with torch.no_grad():
        base.get_submodule(K).weight += kron(own)
    torch.testing.assert_close(models.output(theirs), models.output(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("alpha", "scalar", "scaling"), [(None, None, 1.0), (0.0, None, 1.0), (1.5, 2.0, 2 * S)]
)
def test_scalings_follow_lycoris(alpha, scalar, scaling, tmp_path):
    own = {**loha(4, 5), **({} if scalar is None else {"scalar": torch.tensor(scalar)})}
    source = written(tmp_path / "a", {"x": own}, alpha)
    read = kohya.read(source / "lora.safetensors", Base(names=("x",)))
    assert read.sites["x"].scaling == scaling and "scalar" not in read.sites["x"].tensors


def test_whole_matrices_of_another_scaling_are_folded(tmp_path):
    layers = Layers("LOKR", {"x": Layer({"lokr_w1": draw(2, 2), "lokr_w2": draw(3, 3)}, 0.25)})
    notes = kohya.write(layers, tmp_path)
    assert notes == ["the scaling was folded into the first matrix at 1 layers"]
    again = kohya.read(tmp_path / "lora.safetensors", Base(names=("x",))).sites["x"]
    assert again.scaling == 1.0
    torch.testing.assert_close(again.tensors["lokr_w1"], 0.25 * draw(2, 2))


def test_cores_of_convolutions_go_both_ways(tmp_path):
    """LyCORIS and PEFT lay out the core's factors alike: a is (r, out)."""
    config = peft.LoHaConfig(target_modules=["first", "head"], r=2, alpha=3, use_effective_conv2d=True)
    theirs = peft.get_peft_model(models.conv_net(), config)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "hada" in n:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    theirs.save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    kohya.write(folders.read(tmp_path / "a", settings), tmp_path / "k")
    base = of_model(models.conv_net())
    folders.write(kohya.read(tmp_path / "k" / "lora.safetensors", base), tmp_path / "b", base)
    ours = veneer.load(models.conv_net(), tmp_path / "b")
    torch.testing.assert_close(models.output(ours), models.output(theirs), rtol=1e-5, atol=1e-5)


# -- diag-OFT ----------------------------------------------------------------------------------------------


def turned(W, P, rescale=None):
    """R_k' W_k by the formula, in float64."""
    blocks = []
    for k, block in enumerate(P.double()):
        Q = block - block.T
        eye = torch.eye(len(Q)).double()
        R = (eye + Q) @ torch.linalg.inv(eye - Q)
        blocks.append(R.T @ W.double()[k * len(Q) : (k + 1) * len(Q)])
    made = torch.cat(blocks)
    return made if rescale is None else rescale.double() * made


def test_diag_oft_turns_the_output_rows_of_its_base(tmp_path, base):
    model, P, scale = models.llama(), 0.2 * draw(4, 8, 8), 1 + 0.1 * draw(32, 1)
    source = written(
        tmp_path / "a", {Q: {"oft_blocks": P}, DOWN: {"oft_blocks": P.clone(), "rescale": scale}}, 0.0
    )
    deltas = {}
    for name, rescale in ((Q, None), (DOWN, scale)):
        W = model.get_submodule(name).weight.detach()
        deltas[name] = (turned(W, P, rescale) - W).float()
    done = convert(str(source), out=str(tmp_path / "o"), to="veneer", model=base)
    assert done.notes == ["2 layers are kept dense"]
    ours = veneer.load(models.llama(), tmp_path / "o")
    torch.testing.assert_close(models.output(ours), with_weights(deltas), rtol=1e-4, atol=1e-4)
    R = turned(torch.eye(32), P)
    torch.testing.assert_close(R @ R.T, torch.eye(32).double())


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"oft_blocks": draw(2, 4, 8, 8)}, "are of BOFT, which is not read"),
        ({"oft_blocks": draw(3, 8, 8)}, "do not turn 32 output rows"),
        ({"oft_blocks": draw(4, 8, 8), "alpha": torch.tensor(0.1)}, r"its turning was constrained \(alpha\)"),
        ({"oft_blocks": draw(4, 8, 8), "lora_up.weight": draw(2, 2)}, "other tensors than those of diag-OFT"),
    ],
)
def test_other_rotations_are_refused(own, text, tmp_path):
    source = written(tmp_path / "a", {Q: own}, None)
    with pytest.raises(FormatError, match=text):
        turning.to_changes(models.llama(), source / "lora.safetensors")


# -- refused -----------------------------------------------------------------------------------------------


def test_half_a_layer_mixtures_and_unknown_names_are_refused(tmp_path):
    own = loha(32, 32)
    half = {n: t for n, t in own.items() if n != "hada_w2_b"}
    with pytest.raises(FormatError, match="incomplete tensors of LOHA: x"):
        kohya.read(written(tmp_path / "a", {"x": half}) / "lora.safetensors", Base(names=("x",)))
    mixed = {"x": {**own, "dora_scale": draw(32, 1)}}
    with pytest.raises(FormatError, match=r"other tensors than those of LOHA: lycoris_x\.dora_scale"):
        kohya.read(written(tmp_path / "b", mixed) / "lora.safetensors", Base(names=("x",)))
    with pytest.raises(ConfigError, match="match no known module"):
        kohya.read(written(tmp_path / "c", {"x": own}) / "lora.safetensors", Base(names=("y",)))
    config = peft.LoKrConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    peft.get_peft_model(models.llama(), config).save_pretrained(tmp_path / "d")
    with pytest.raises(FormatError, match="other tensors than those of LOKR"):
        folders.read(tmp_path / "d", {"peft_type": "LOKR", "r": 2, "alpha": 8})
