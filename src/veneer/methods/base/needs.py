"""Describes the input that a start needs beyond its random draw."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """The input of a start; `sentence` tells users where it comes from.

    of_weight: s B A is a part of W. leading: that part is the leading one. gradient: from calibration.
    residual: s B A is W's quantisation error, which acts from the first step on and is not subtracted.
    """

    sentence: str = ""
    of_weight: bool = False
    leading: bool = False
    gradient: bool = False
    residual: bool = False


NOTHING = Needs()
WEIGHT = Needs("It takes A and B out of the weight.", of_weight=True)
LEADING = Needs(
    "It takes A and B out of the leading singular triplets of the weight.", of_weight=True, leading=True
)
GRADIENT = Needs(
    "It needs the loss's gradient: `veneer fit` calibrates by itself, other loops call `veneer.calibrate`.",
    gradient=True,
)
RESIDUAL = Needs(
    "It needs a quantised base: `veneer fit --quantise nf4`, or `veneer.quantise_around` in Python.",
    of_weight=True,
    residual=True,
)
