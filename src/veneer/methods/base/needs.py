"""Describes the input that a start needs beyond its random draw."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """The input of a start; `sentence` tells users where it comes from.

    of_weight: s B A is a part of W. leading: that part is the leading one. gradient: from calibration.
    residual: s B A is W's quantisation error, which acts from the first step on and is not subtracted.
    acts: the start acts too. mean: of the gradient over the labels. inputs, oriented: the statistics of that
    name, from calibration.
    """

    sentence: str = ""
    of_weight: bool = False
    leading: bool = False
    gradient: bool = False
    residual: bool = False
    acts: bool = False
    mean: bool = False
    inputs: bool = False
    oriented: bool = False

    @property
    def data(self) -> bool:
        """True if the start needs a calibration."""
        return self.gradient or self.inputs or self.oriented


NOTHING = Needs()
WEIGHT = Needs("It takes A and B out of the weight.", of_weight=True)
LEADING = Needs(
    "It takes A and B out of the leading singular triplets of the weight.", of_weight=True, leading=True
)
GRADIENT = Needs(
    "It needs the loss's gradient: `veneer fit` calibrates by itself, other loops call `veneer.calibrate`.",
    gradient=True,
)
MEAN_GRADIENT = GRADIENT._replace(acts=True, mean=True)
_OF_INPUTS = (
    "It needs the layers' inputs: `veneer fit` calibrates by itself, other loops call"
    " `veneer.calibrate(.., inputs=True)`."
)
INPUTS = Needs(_OF_INPUTS, inputs=True)
ORIENTED = Needs(_OF_INPUTS, of_weight=True, oriented=True)
RESIDUAL = Needs(
    "It needs a quantised base: `veneer fit --quantise nf4`, or `veneer.quantise_around` in Python.",
    of_weight=True,
    residual=True,
)
