"""Matrices in 4 to 8 bits per number, and products that keep no unpacked matrix for the backward.

int8: w ~ c a / 127 with whole c in [-127, 127] and one a, the largest |w|, for each row: 8 bits a number.
nf4: w ~ L[c] a with 16 levels L, the quantiles of a normal distribution in [-1, 1] with an exact 0, and one a
for each block of 64 numbers; the a's are kept in 8 bits themselves, in blocks of 256 with one float32 each
(double quantisation): 4.127 bits a number.  Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314,
sections 2 and 3.

What differs from the paper: a = a_max 2^(-k/24), k in 0..255, where the paper keeps a in 8-bit floats after
taking their mean off; a is within 1.5 % of the block's largest number wherever that is above a 1500th of
a_max, so that one row of outliers does not spoil the blocks beside it. A level is chosen for the a that is
kept, and the a's are such that packing what was unpacked gives the same bytes.

spqr: 4 bits with a scale and a zero for each 16 numbers, and a hundredth of every row kept apart: 5.07 bits a
number, see veneer.ops.quant.spqr.

Cost of a product: the matrix is unpacked once forward and once backward, in the dtype of x, and forgotten;
int8's a is multiplied into the product and not into the matrix. Error in W, of normal numbers: int8 0.8 %,
spqr 6 %, nf4 9 %.
Use: int8 halves a bfloat16 base at little cost, spqr takes a third, nf4 nearly a quarter. Against: without a
kernel of their own spqr and nf4 cost more time than they save in memory traffic; small layers and embeddings
suffer most, and are left out by `veneer.quantise`.
"""

from veneer.ops.quant.formats import Format, Int8, Parts
from veneer.ops.quant.nf4 import BLOCK, LEVELS, NF4
from veneer.ops.quant.products import product
from veneer.ops.quant.registry import FORMATS, get, rounded
from veneer.ops.quant.spqr import SpQR

__all__ = [
    "BLOCK",
    "FORMATS",
    "LEVELS",
    "NF4",
    "Format",
    "Int8",
    "Parts",
    "SpQR",
    "get",
    "product",
    "rounded",
]
