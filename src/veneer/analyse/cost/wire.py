"""Bytes that the processes of a training exchange in a step, and the memory that each one needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from veneer.analyse.cost.simulate import Memory

# Six numbers of 8 bytes a step: the signal to stop, labels before and after, loss, tokens, positions.
COUNTS = 6 * 8


class Wire(NamedTuple):
    """Bytes that a process hands to collectives in a step.

    gradients: of the trained parameters; blocks: of the divided base; sent: by a ring of the processes;
    factors: of pairs that one process steps for all.
    """

    gradients: int
    blocks: int
    sent: int
    factors: int = 0

    @property
    def handed(self) -> int:
        """Returns all bytes that a process hands to collectives."""
        return self.gradients + self.blocks + self.factors + COUNTS


def wire(
    gradients: int, blocks: Sequence[int], processes: int, passes: int, *, shard: bool, factors: int = 0
) -> Wire:
    """Returns the bytes of a step. blocks: frozen bytes of each block of the base; factors: see Wire.

    A divided block is gathered for the forward pass and again for the backward pass.
    """
    own = 2 * passes * sum(-(-n // processes) for n in blocks) if shard else 0
    sent = (2 * gradients + factors) * (processes - 1) // processes + own * (processes - 1)
    return Wire(gradients, own, sent, factors)


def of_process(whole: Memory, blocks: Sequence[int], processes: int, *, shard: bool) -> Memory:
    """Returns the memory of one process. whole: of a step with this process' rows on a whole base.

    The joined gradients are held twice more when the activations are free again. Two blocks of a divided base
    are whole at a time: the one that runs, and the next one.
    """
    held = whole.weights + whole.adapter + whole.gradients + whole.optimiser
    peak = max(whole.peak, held + 2 * whole.gradients) if processes > 1 else whole.peak
    if not shard:
        return whole._replace(peak=peak)
    divided = sum(blocks) - sum(-(-n // processes) for n in blocks)
    two = sum(sorted(blocks)[-2:])
    return whole._replace(weights=whole.weights - divided, peak=peak - divided + two)
