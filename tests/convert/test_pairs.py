"""The common form: padding, folding, truncating, parts of a pipeline, and its errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pairs import BASE, draw, llama_pairs, pair

from veneer.convert import Pair, Pairs, read, write
from veneer.convert.pairs import cut, folded, padded, take_part, to_dtype, uniform
from veneer.errors import ConfigError, FormatError


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.floats(0.01, 100), st.integers(0, 9))
def test_padding_and_folding_keep_the_product(rank, more, scaling, seed):
    pairs = Pairs({"x": pair(7, 6, rank, scaling, seed=seed)})
    want = pairs.sites["x"].product().double()
    for other in (padded(pairs, rank + more), folded(pairs).pairs, uniform(pairs).pairs):
        assert (other.sites["x"].product() - want).norm() <= 1e-6 * want.norm()
    assert torch.equal(padded(pairs, rank + more).sites["x"].product(), pairs.sites["x"].product())
    wide = padded(pairs, rank + more).sites["x"]
    assert not wide.A[rank:].any() and not wide.B[:, rank:].any()


def test_folding_says_how_much_was_rounded():
    exact = folded(Pairs({"x": pair(4, 4, scaling=0.25)}))
    assert exact.notes == [] and exact.pairs.sites["x"].scaling == 1.0
    rounded = folded(Pairs({"x": pair(64, 64, scaling=0.3, dtype=torch.bfloat16)}))
    (note,) = rounded.notes
    said = float(
        re.fullmatch(
            r"the scaling was folded into B at 1 layers; relative rounding error at most (.*)", note
        )[1]
    )
    assert 1e-4 < said < 2**-8


def test_cutting_is_the_best_approximation():
    pairs = Pairs({"x": pair(9, 8, 5, 1.5)})
    ready, (note,) = cut(pairs, rank=2)
    U, S, Vh = torch.linalg.svd(pairs.sites["x"].product().double())
    best = (U[:, :2] * S[:2]) @ Vh[:2]
    assert (ready.sites["x"].product() - best).norm() < 1e-5 * best.norm()
    lost = float(S[2:].norm() / S.norm())
    assert note == f"truncated to rank <= 2; relative error of a layer's change at most {lost:.2%}"
    with pytest.raises(
        FormatError, match=r"DoRA's change is not low-rank; .* needs the base model: x; give model="
    ):
        cut(Pairs({"x": pair(4, 4, dora=True)}), rank=1)


def test_another_dtype_is_said():
    ready, notes = to_dtype(Pairs({"x": pair(4, 4, dora=True)}), torch.float16)
    assert notes == ["factors were converted from float32 to float16"]
    assert ready.sites["x"].A.dtype == torch.float16 and ready.sites["x"].magnitude.dtype == torch.float32
    assert to_dtype(ready, torch.float16).notes == []


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(
        FormatError,
        match=re.escape(
            "A must be (r, in, ..) and B (out, r), with sizes that fit, got x: A (3, 4), B (5, 2)"
        ),
    ):
        Pairs({"x": Pair(draw(3, 4), draw(5, 2), 1.0)})
    with pytest.raises(
        FormatError, match="the adapter must hold at least one pair of factors A and B, got none"
    ):
        Pairs({})


def test_parts_of_a_pipeline():
    both = Pairs({"unet.a": pair(4, 4), "text_encoder.b": pair(4, 4)}, parts=("unet", "text_encoder"))
    one = take_part(both, "unet")
    assert list(one.sites) == ["unet.a"] and one.left_out == ("text_encoder.b",)
    with pytest.raises(ConfigError, match="unknown part 'unt' of the adapter; did you mean 'unet'"):
        take_part(both, "unt")
    with pytest.raises(FormatError, match="modules must belong to one of the parts unet, got b"):
        Pairs({"b": pair(4, 4)}, parts=("unet",))


def test_one_model_only(tmp_path):
    both = Pairs({"unet.a": pair(4, 4), "text_encoder.b": pair(4, 4)}, parts=("unet", "text_encoder"))
    with pytest.raises(
        ConfigError,
        match=(
            "the adapter changes unet and text_encoder, but this dialect holds one model; choose one with"
            " part="
        ),
    ):
        write(both, tmp_path / "x", "peft")
    assert not (tmp_path / "x").exists()


def test_writing_needs_an_empty_folder_and_a_known_dialect(tmp_path):
    write(llama_pairs(), tmp_path / "x", "peft")
    with pytest.raises(ConfigError, match="x is not empty; choose another folder or empty it"):
        write(llama_pairs(), tmp_path / "x", "kohya")
    with pytest.raises(ConfigError, match="unknown dialect 'kohja'; did you mean 'kohya'"):
        write(llama_pairs(), tmp_path / "y", "kohja")


def test_layers_that_the_base_does_not_have(tmp_path):
    write(Pairs({"model.layers.7.self_attn.q_proj": pair(32, 32)}), tmp_path / "x", "peft")
    with pytest.raises(
        FormatError,
        match=(
            r"1 of 1 layers are missing in the base model: model\.layers\.7\.self_attn\.q_proj; it has e\.g\."
        ),
    ):
        read(tmp_path / "x", base=BASE)
