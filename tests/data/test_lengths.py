"""The length that `auto` chooses, by hand."""

from __future__ import annotations

import pytest

from veneer.data.lengths import choose, percentile


@pytest.mark.parametrize(
    ("lengths", "context", "length", "words"),
    [
        ([], 2048, 256, "texts are cut into windows of it"),
        ([], 128, 128, "texts are cut"),
        ([5, 9, 40], None, 256, "rows have 9 tokens at the median, 40 at 90 %, 40 at 99 %, at most 40"),
        (
            [300] * 99 + [430],
            None,
            448,
            "rows have 300 tokens at the median, 300 at 90 %, 300 at 99 %, at most 430",
        ),
        ([300] * 99 + [9000], None, 320, "at 99 %, at most 9000"),
        ([300] * 98 + [900, 9000], None, 960, "300 at 90 %, 900 at 99 %, at most 9000"),
        ([1500], 1024, 1024, "limited by the model's context"),
        ([1500], 1500, 1500, "at most 1500"),
        ([9000], 32768, 4096, "auto takes at most 4096"),
    ],
)
def test_the_chosen_length(lengths, context, length, words):
    found = choose(lengths, context)
    assert found.length == length
    assert found.reason.startswith(f"length {length} (auto): ") and words in found.reason


def test_percentiles_are_of_the_nearest_rank():
    assert [percentile([4, 1, 3, 2], share) for share in (0.01, 0.25, 0.26, 0.5, 0.99, 1.0)] == [
        1,
        1,
        2,
        2,
        4,
        4,
    ]
