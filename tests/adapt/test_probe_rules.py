"""Rules of the golden probe: which numbers are kept, how far they may be, and which inputs are taken."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from support.models import SIZES, randomise
from torch import nn

import veneer
from veneer.adapt import probe
from veneer.adapt.probe_inputs import default_inputs, packed, packed_default, unpacked
from veneer.errors import ConfigError


def layer(out=5, dtype=torch.float32):
    torch.manual_seed(0)
    model = veneer.attach(nn.Sequential(nn.Linear(4, out)).to(dtype), "lora", rank=2)
    randomise(model)
    return model


def taken(rows, out, dtype=torch.float32, **options):
    model = layer(out, dtype)
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
    return model, x.to(dtype), probe.take(model, "default", {"input": x.to(dtype)}, **options)


@pytest.mark.parametrize(("rows", "step", "n"), [(20, 1, 100), (51, 1, 255), (140, 2, 256), (154, 3, 256)])
def test_at_most_256_numbers_are_kept_at_even_distances(rows, step, n):
    model, x, record = taken(rows, 5)
    assert record["where"] == [step * i for i in range(n)] and record["shape"] == [rows, 5]
    with torch.no_grad():
        on = model(x).flatten()[record["where"]]
        with veneer.using(model):
            off = model(x).flatten()[record["where"]]
    assert torch.equal(torch.tensor(record["on"]), on) and torch.equal(torch.tensor(record["off"]), off)
    assert not torch.equal(on, off) and "compared" not in record


@pytest.mark.parametrize(
    ("dtype", "kept_in", "wanted"),
    [
        (torch.float32, None, "float32"),
        (torch.float32, torch.bfloat16, "bfloat16"),
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.float64, torch.float16, "float16"),
        (torch.float64, None, "float64"),
    ],
)
def test_the_coarser_dtype_of_model_and_file_is_noted(dtype, kept_in, wanted):
    _, _, record = taken(3, 5, dtype, kept_in=kept_in)
    assert (record["dtype"], record["precision"]) == (wanted, wanted)


def test_outputs_of_a_base_that_a_file_replaces_are_not_compared():
    assert taken(3, 5, replaced=["0"])[2]["compared"] == ["on"]


@pytest.mark.parametrize("where", ["off", "on"])
@pytest.mark.parametrize("every", [False, True])
def test_outputs_that_are_not_finite_are_no_probe(where, every):
    model, x = layer(), torch.ones(2, 4)

    def spoil(module, args, y):
        if bool(veneer.active(model)) == (where == "on"):
            return y * torch.nan if every else torch.cat([y[:1], y[1:] * torch.inf])
        return None

    model.register_forward_hook(spoil)
    assert probe.take(model, "default", {"input": x}) == "the outputs are not finite"


class Needy(nn.Module):
    """Takes token ids, and needs more than these."""

    def __init__(self):
        super().__init__()
        self.config = T.PretrainedConfig(vocab_size=20, max_position_embeddings=8)
        self.embed, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, input_ids, extra=None):
        return self.head(self.embed(input_ids)) + extra


def test_a_model_that_fails_on_token_ids_says_so_unless_inputs_were_given():
    model = veneer.attach(Needy(), "lora", to=["head"], rank=2)
    assert probe.take(model, "default").startswith(
        "the model fails on bare token ids (TypeError); pass probe="
    )
    ids = torch.arange(4).view(1, 4)
    with pytest.raises(TypeError):
        probe.take(model, "default", {"input_ids": ids})
    assert probe.take(model, "default", {"input_ids": ids, "extra": 1.0})["shape"] == [1, 4, 3]
    assert not probe.is_idle(model, probe.through(model, "default"))


N, COUNTED = 41, 31  # numbers, and the three quarters of them that count
NOISE = {"float64": (1.5e-7, 0.0), "float32": (3e-6, 5e-7), "float16": (2.5e-3, 7.5e-4)}
NOISE |= {"bfloat16": (2e-2, 6e-3)}
OF_EFFECT = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
DRAW = torch.randn(2, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OFF, ON = DRAW[0], DRAW[0] + 2 * DRAW[1]


def problems(y, adapted_y, model, saved="float32", **more):
    record = {"inputs": {}, "shape": [N], "where": [*range(N)], "off": OFF.tolist(), "on": ON.tolist()}
    record |= {"dtype": saved, "precision": saved, **more}
    return probe.check(model, lambda inputs, adapted: adapted_y if adapted else y, record)


def signs():
    return torch.tensor([(-1.0) ** i for i in range(N)], dtype=torch.float64)


@pytest.mark.parametrize("blocks", [0, 1, 9])
@pytest.mark.parametrize(
    ("saved", "own", "coarser"),
    [(d, d, d) for d in NOISE] + [("bfloat16", "float32", "bfloat16"), ("float32", "float16", "float16")],
)
def test_outputs_may_be_off_by_the_noise_of_the_coarser_side(saved, own, coarser, blocks, monkeypatch):
    monkeypatch.setattr(probe, "blocks", lambda model: [nn.Identity()] * blocks)
    model = nn.Linear(2, 2).to(getattr(torch, own))
    a, b = NOISE[coarser]
    share = a + b * {0: 1, 1: 1, 9: 3}[blocks]
    larger = max(float(OFF.norm()), float(ON.norm()))
    of_effect = OF_EFFECT[coarser] * float((ON - OFF).norm()) + math.sqrt(2) * share * larger
    margin = 0.03 if coarser == "float64" else 0.001  # of float64 nine digits are kept
    for by, wanted in ((1 - margin, 0), (1 + margin, 1)):
        unit = by * signs() / COUNTED**0.5
        off = OFF + share * larger * unit
        assert len(problems(off, off + ON - OFF, model, saved)) == wanted
        assert len(problems(OFF, ON + of_effect * unit, model, saved)) == wanted
        alone = ON + share * float(ON.norm()) * unit
        assert len(problems(OFF + 9, alone, model, saved, compared=["on"])) == wanted


def test_a_quarter_of_the_numbers_may_be_far_off_but_not_lost():
    model = nn.Linear(2, 2)
    moved = ON.clone()
    moved[5 : 5 + N - COUNTED] -= 100.0
    assert problems(OFF, moved, model) == []
    moved[0] -= 100.0
    assert len(problems(OFF, moved, model)) == 1
    for lost in (torch.nan, torch.inf):
        moved = ON.clone()
        moved[3] = lost
        assert len(problems(OFF, moved, model)) == 1
    zero = torch.zeros(N)
    assert problems(zero, zero, model, off=zero.tolist(), on=zero.tolist()) == []


def test_outputs_of_another_shape_are_named():
    (found,) = problems(OFF.view(1, N), ON.view(1, N), nn.Linear(2, 2))
    assert found == "probe: the model's output is (1, 41), it was (41,) when the adapter was saved"


@pytest.mark.parametrize(
    ("mode", "cuda", "wanted"),
    [
        ("highest", False, "float32"),
        ("high", False, "float16"),
        ("medium", False, "bfloat16"),
        ("highest", True, "float16"),
        ("medium", True, "bfloat16"),
    ],
)
def test_fast_modes_of_products_are_not_float32(mode, cuda, wanted, monkeypatch):
    """Convolutions on CUDA use TF32 unless that is turned off."""
    p = SimpleNamespace(dtype=torch.float32, is_cuda=cuda, is_floating_point=lambda: True)
    codes = SimpleNamespace(dtype=torch.int8, is_cuda=cuda, is_floating_point=lambda: False)
    monkeypatch.setattr(probe, "base_parameters", lambda model: {"codes": codes, "w": p})
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(mode)
        assert probe._precision(nn.Identity()) == wanted
        p.dtype = torch.float64
        assert probe._precision(nn.Identity()) == "float64"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("dtype", "coarser"), [("float32", "float16"), ("bfloat16", "bfloat16")])
def test_probes_without_a_precision_are_taken_for_fast_ones(dtype, coarser):
    model = nn.Linear(2, 2)
    a, b = NOISE[coarser]
    for by, wanted in ((0.999, 0), (1.001, 1)):
        off = OFF + by * (a + b) * float(ON.norm()) * signs() / COUNTED**0.5
        record = {"inputs": {}, "shape": [N], "where": [*range(N)], "dtype": dtype}
        record |= {"off": OFF.tolist(), "on": ON.tolist()}
        found = probe.check(model, lambda _, adapted, off=off: off + (ON - OFF) * adapted, record)
        assert float(ON.norm()) > float(OFF.norm()) and len(found) == wanted


def llama(**options):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, **options})).eval()


@pytest.mark.parametrize("n", [0, 3, 16, 20])
def test_inputs_end_with_the_tokens_that_an_adapter_changes(n):
    model, seen = llama(), []
    usual = packed_default(model)["input_ids"]["values"][0]
    tokens = [50 + i for i in range(n)]

    def run(inputs, adapted):
        seen.append((inputs["input_ids"]["values"], adapted))
        return torch.ones(2) * (adapted and differs)

    for differs in (False, True):
        seen.clear()
        assert probe.is_idle(model, run, tokens) is not differs
        wanted = [*usual, *tokens][n : n + 16] if n < 16 else tokens[:16]
        assert seen == [([wanted], False), ([wanted], True)]


def test_models_without_token_ids_are_never_idle():
    model = layer()
    assert not probe.is_idle(model, lambda inputs, adapted: pytest.fail("nothing to run on"))


Y = torch.ones(2, dtype=torch.float64)
OUTPUTS = [Y, (None, Y), [3, Y], {"loss": 1.0, "y": Y}, SimpleNamespace(logits=Y)]
OUTPUTS += [T.modeling_outputs.BaseModelOutput(last_hidden_state=Y)]


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_output_is_the_logits_or_the_first_tensor(output):
    found = probe.output_of(output)
    assert found.dtype == torch.float32 and found.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("output", [None, (1, 2), {"a": "b"}, SimpleNamespace(logits=None), "text"])
def test_outputs_without_a_tensor_are_refused(output):
    with pytest.raises(ConfigError, match=rf"must return a tensor.*got a {type(output).__name__}"):
        probe.output_of(output)


def test_the_fixed_tokens_stay_the_same_in_every_version():
    small = packed_default(llama(vocab_size=97))["input_ids"]
    assert small == {"dtype": "int64", "values": [[(1 + 7919 * i) % 97 for i in range(16)]]}
    large = packed_default(llama(vocab_size=8192))["input_ids"]["values"]
    assert large == [[2000 + 367 * i % 1000 for i in range(16)]]
    short = default_inputs(llama(max_position_embeddings=5))["input_ids"]
    assert short.shape == (1, 5) and short.dtype == torch.int64


def test_encoders_with_decoders_get_tokens_twice():
    sizes = dict(vocab_size=96, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    found = default_inputs(T.T5ForConditionalGeneration(T.T5Config(**sizes)))
    assert torch.equal(found["input_ids"], found["decoder_input_ids"]) and len(found) == 2
    assert list(default_inputs(llama())) == ["input_ids"]


class Text(nn.Module):
    """A model whose configuration wraps that of a language model; it gives logits of tokens if it may."""

    def __init__(self, writes, takes=True):
        super().__init__()
        text = T.LlamaConfig(vocab_size=50)
        self.config = SimpleNamespace(get_text_config=lambda: text, vocab_size="none")
        self.head = nn.Linear(2, 2)
        if writes is not None:
            self.get_output_embeddings = lambda: self.head if writes else None
        if not takes:
            self.forward = lambda pixels: pixels

    def forward(self, input_ids):
        return input_ids


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        (Text(True), True),
        (Text(False), False),
        (Text(None), False),
        (Text(True, takes=False), False),
        (layer(), False),
    ],
)
def test_models_that_write_no_tokens_get_none(model, fits):
    assert (default_inputs(model) is not None) is fits
    assert isinstance(packed_default(model), str) is not fits


def test_inputs_come_back_from_json_as_they_were():
    given = {"x": torch.tensor([1.5, -2.0]), "ids": torch.tensor([[3]]), "n": 2, "f": 0.5, "no": None}
    given |= {"flag": True, "text": "word"}
    for model in (nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()):
        found = unpacked(model, packed(given))
        assert found["x"].dtype == model.weight.dtype and found["x"].tolist() == [1.5, -2.0]
        assert found["ids"].dtype == torch.int64 and found["ids"].tolist() == [[3]]
        assert {k: found[k] for k in ("n", "f", "no", "flag", "text")} == {
            k: given[k] for k in ("n", "f", "no", "flag", "text")
        }
    codes = nn.Module()
    codes.w = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert unpacked(codes, packed(given))["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.zeros(65536), True),
        (torch.zeros(65537), False),
        (torch.zeros(2, dtype=torch.complex64), False),
        (torch.zeros(65537, dtype=torch.complex64), False),
        ([1, 2], False),
        (object(), False),
    ],
)
def test_inputs_that_no_json_holds_are_refused(value, fits):
    if fits:
        assert packed({"x": value})["x"]["values"] == value.tolist()
    else:
        with pytest.raises(ConfigError, match="probe input 'x': must "):
            packed({"x": value})
