"""Weights are compared by the rounding of their two formats, and no further apart."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from veneer.adapt.store.fingerprint import differences, measure

STEP = 2.0**-11  # half of float16's spacing at 1; half of bfloat16's is 8 of them


def model(value: float, dtype: torch.dtype) -> nn.Module:
    linear = nn.Linear(3, 2, bias=False).to(dtype)
    nn.init.constant_(linear.weight, value)
    return linear


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("half", "brain", "alike"), [(1 - 9 * STEP, 1.0, True), (1 - 10 * STEP, 1.0, False)])
def test_two_roundings_of_one_number_differ_by_half_a_unit_of_each_format(sign, half, brain, alike):
    """The limit is relative to the larger number: 8 + 1 steps at 1, whichever of both is the adapter's."""
    a, b = model(sign * half, torch.float16), model(sign * brain, torch.bfloat16)
    assert (differences(a, measure(b)) == []) == (differences(b, measure(a)) == []) == alike


def test_numbers_below_float16_are_zero_in_it():
    least = 2.0**-24  # the smallest float16
    for value, alike in ((0.5 * least, True), (2.5 * least, False)):
        stored = measure(model(value, torch.bfloat16))
        assert (differences(model(0.0, torch.float16), stored) == []) == alike


def test_formats_other_than_float16_leave_no_room():
    a, b = model(1.0, torch.bfloat16), model(1 + 2.0**-6, torch.float32)
    assert differences(b, measure(a)) and differences(a, measure(b))


def test_the_sample_of_a_large_weight_is_the_one_in_files_of_earlier_versions():
    """4096 numbers hashed and 32 kept, at multiples of 2^32 over the golden ratio."""
    linear = nn.Linear(100, 90, bias=False)
    flat = torch.arange(9000.0) / 7
    linear.weight.data = flat.view(90, 100)
    places = [i * 2654435761 % 9000 for i in range(4096)]
    seen = flat[places].to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    record = measure(linear)["tensors"]["weight"]
    assert record["sha256"] == hashlib.sha256(b"weight (90, 100) " + seen).hexdigest()[:32]
    assert record["sample"] == [float(f"{v:.9g}") for v in flat[places[:32]].tolist()]
