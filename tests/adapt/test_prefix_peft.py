"""Prefixes in PEFT's files: the same outputs and gradients on both sides wherever positions turn keys, and
refusals elsewhere."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from oracles import rotary
from safetensors.torch import load_file, save_file
from support.models import bert, gpt2, llama, output, randomise
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.adapt.peft.rotary import turns
from veneer.adapt.peft.settings import CONFIG, TENSORS
from veneer.errors import FormatError

P = 3
IDS = torch.tensor([[5, 9, 33, 2, 71], [8, 8, 41, 6, 90]])


def other(kind: str, **config) -> nn.Module:
    """A tiny model of another family than Llama."""
    import transformers

    settings = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    settings |= dict(max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2)
    torch.manual_seed(0)
    own = getattr(transformers, f"{kind}Config")(
        **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2, **config
    )
    return getattr(transformers, f"{kind}ForCausalLM")(own).eval()


# Model -> its builder; base, turned numbers and neighbours of its positions by layer, from its configuration;
# None where it has none.
MODELS = {
    "llama": (llama, [(10000, 8, False)] * 2),
    "pairs of neighbours": (lambda: other("Cohere"), [(500000, 8, True)] * 2),
    "half of the numbers": (lambda: other("Phi", partial_rotary_factor=0.5), [(10000, 4, False)] * 2),
    "a layer without positions": (
        lambda: other("SmolLM3", no_rope_layers=[1, 0]),
        [(2000000, 8, False), None],
    ),
}


def in_peft(model: nn.Module, **config) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            model, peft.PrefixTuningConfig(**{"task_type": "CAUSAL_LM", "num_virtual_tokens": P, **config})
        ).eval()


def learned(model: nn.Module) -> torch.Tensor:
    """Logits, after a backward pass."""
    y = model(input_ids=IDS).logits
    y.square().mean().backward()
    return y.detach()


def assert_same(ours: nn.Module, theirs: nn.Module, places) -> None:
    """Outputs, and the gradient of every key and value, of which PEFT's stand P positions further on."""
    a, b = learned(ours), learned(theirs)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))
    (table,) = (p for p in theirs.parameters() if p.grad is not None)
    rows = table.grad.unflatten(1, (len(places), 2, 2, -1)).permute(1, 2, 3, 0, 4)
    for (_, delta), place, (K, V) in zip(changes(ours, "default"), places, rows, strict=True):
        K = K if place is None else rotary.moved(K, -P, *place)
        for own, expected in ((delta.K.grad, K.double()), (delta.V.grad, V.double())):
            torch.testing.assert_close(
                own.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )


@pytest.mark.parametrize("kind", MODELS)
def test_files_go_both_ways_with_the_same_outputs_and_gradients(kind, tmp_path):
    build, places = MODELS[kind]
    theirs = in_peft(build().double())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = veneer.load(build().double(), tmp_path / "theirs", trainable=True)
    assert_same(ours, theirs, places)
    with veneer.using(ours):
        assert (output(ours) - output(theirs)).abs().max() > 1e-2
    made = veneer.attach(build().double(), "prefix", length=P)
    randomise(made, size=0.5)
    veneer.save(made, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(build().double(), tmp_path / "ours").requires_grad_(True)
    opened.base_model.requires_grad_(False)
    assert_same(made, opened.eval(), places)
    again = veneer.load(build().double(), tmp_path / "ours")
    torch.testing.assert_close(output(again), output(made))
    assert changes(again, "default")[0][1].options["length"] == P


def test_a_projected_prefix_is_what_it_was_projected_to(tmp_path):
    theirs = in_peft(llama(), prefix_projection=True, encoder_hidden_size=7)
    theirs.save_pretrained(tmp_path)
    ours = veneer.load(llama(), tmp_path)
    torch.testing.assert_close(output(ours), output(theirs), rtol=0, atol=1e-4)


def test_the_file_is_pefts_and_nothing_else(tmp_path):
    model = veneer.attach(llama(), "prefix", length=P)
    randomise(model)
    veneer.save(model, tmp_path, dtype=torch.bfloat16)
    written = json.loads((tmp_path / CONFIG).read_text())
    theirs = peft.PrefixTuningConfig().to_dict()
    assert set(written) <= set(theirs) and {k for k in theirs if k not in written} <= {"peft_version"}
    tensors = load_file(tmp_path / TENSORS)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        "prompt_embeddings": ((P, 2 * 2 * 16), torch.bfloat16)
    }
    veneer.load(llama(), tmp_path)


def test_what_peft_cannot_express_is_kept_in_our_own_layout(tmp_path):
    for i, (build, options) in enumerate([(gpt2, {}), (bert, {}), (llama, {"to": ["layers.1.self_attn"]})]):
        model = veneer.attach(build(), "prefix", length=P, **options)
        randomise(model)
        veneer.save(model, tmp_path / str(i))
        assert not (tmp_path / str(i) / CONFIG).exists()
        assert torch.equal(output(veneer.load(build(), tmp_path / str(i))), output(model))


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
POSITIONS = "PEFT moves the text behind the prefix, and in this model that changes more than the prefix"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (gpt2, "its positions are not rotary; train a prefix here"),
        (
            lambda: llama(rope_parameters=DYNAMIC),
            r"the frequencies of its positions change with the length of the text \(dynamic\)",
        ),
        (
            lambda: other("Mistral", sliding_window=8),
            r"some layers see a part of the text only \(sliding_attention\)",
        ),
    ],
)
def test_positions_that_cannot_be_turned_back_are_refused(build, text, tmp_path):
    in_peft(build()).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=f"{POSITIONS}: {text}"):
        veneer.load(build(), tmp_path)


def test_keys_that_are_no_turned_ones_are_noticed():
    model = llama()
    model.model.rotary_emb.register_forward_hook(lambda m, args, y: (y[0], y[1] * 0.5))
    assert turns(model) == "its keys depend on positions in another way (layer 0)"
    model = llama()
    model.forward = None
    assert turns(model) == "its keys could not be read (TypeError)"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            dict(task_type="SEQ_CLS"),
            r"task_type='SEQ_CLS': only prefixes of language models \(CAUSAL_LM\) are read",
        ),
        (
            dict(num_transformer_submodules=2),
            "num_transformer_submodules: there is a prefix of a decoder beside an encoder's",
        ),
        (
            dict(modules_to_save=["norm"]),
            r"modules_to_save=\['norm'\]: layers were trained whole beside the prefix",
        ),
        (dict(brand_new=7), "brand_new=7: a setting of PEFT that is not known here"),
    ],
)
def test_settings_that_say_more_than_a_prefix_are_refused(settings, text, tmp_path):
    in_peft(llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **settings}))
    with pytest.raises(FormatError, match=text):
        veneer.load(llama(), tmp_path)


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    in_peft(llama()).save_pretrained(tmp_path)
    with pytest.raises(
        FormatError, match=r"wrong shape: prompt_embeddings is \(3, 64\), the model asks for \(p, 96\)"
    ):
        veneer.load(llama(num_hidden_layers=3), tmp_path)
    with pytest.raises(FormatError, match="prefix needs attn_implementation='sdpa', the model has 'eager'"):
        veneer.load(llama(attn_implementation="eager"), tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / TENSORS)
    with pytest.raises(FormatError) as e:
        veneer.load(llama(), tmp_path)
    assert "1 tensors belong to no layer: other (2,)" in str(e.value) and "missing: prompt_embeddings" in str(
        e.value
    )
