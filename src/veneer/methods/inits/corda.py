"""CorDA: s B0 A0 = U S V' C^-1, a part of W by its effect on the inputs, U S V' = W C.  Yang et al. 2024,
https://arxiv.org/abs/2406.05223

C = X'X of the layer's inputs X, with a thousandth of its mean diagonal added to the diagonal. The leading
triplets adapt what the inputs of calibration use most (`instruction`). The least ones adapt what they use
least, so that knowledge which those inputs need stays (`knowledge`: calibrate on texts of that knowledge).

State: the fixed start beside A and B, which is subtracted.
Cost: a product of rank 2r; before the training a calibration, and a decomposition of every weight.
Use: as PiSSA, with directions that the inputs use.
Against: PEFT 0.21.2 divides each sample by its largest signed number, which weighs samples anew; its start is
another one.
"""

from torch import Tensor

from veneer.errors import ConfigError, suggest
from veneer.methods.base.needs import ORIENTED
from veneer.methods.inits import Start

NEEDS = ORIENTED
MODES = ("instruction", "knowledge")


def alpha(rank: int, stabilised: bool) -> float:
    return float(rank)


def start(s: Start, *, mode: str = "instruction") -> tuple[Tensor, Tensor]:
    """Returns A (r, in) and B (out, r) with s B A the chosen part of W.

    mode: instruction: the leading triplets; knowledge: the least ones
    """
    if mode not in MODES:
        raise ConfigError(f"init_options: unknown mode {mode!r}{suggest(mode, MODES)}")
    U, S, Vh = s.inputs("oriented")[MODES.index(mode)]
    root = (S[: s.rank] / s.scaling).sqrt()
    return root[:, None] * Vh[: s.rank], U[:, : s.rank] * root
