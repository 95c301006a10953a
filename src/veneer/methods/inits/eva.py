"""EVA: A0 = the leading directions of the layer's inputs, B0 = 0.  Paischer et al. 2024,
https://arxiv.org/abs/2410.07170

The rows of A are the leading right singular vectors of the inputs X, so A x holds as much of an input as r
numbers can. PEFT's file of it is plain LoRA. The paper also moves ranks between layers, which `veneer rank`
does by other measures.

State: none beyond the method's.
Cost: a calibration before the training, which keeps a matrix (in, in) a layer meanwhile, once for layers that
read the same input.
Use: adapters that should read all directions that occur.
Against: the directions of most variance are not those that the task needs.
"""

from torch import Tensor

from veneer.methods.base.needs import INPUTS
from veneer.methods.inits import Start

NEEDS = INPUTS


def alpha(rank: int, stabilised: bool) -> float:
    return 2.0 * rank


def start(s: Start) -> tuple[Tensor, Tensor]:
    """Returns A (r, in) with orthonormal rows, and B (out, r) zero."""
    Vh = s.inputs("inputs")[0].Vh
    return Vh[: s.rank].clone(), s.W.new_zeros(s.W.shape[0], s.rank)
