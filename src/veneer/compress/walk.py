"""Runs the blocks of a model one at a time on hidden states that are kept between them.

The model's own forward decides what every block is called with (masks, positions): it runs once with blocks
that only note their arguments and pass the hidden states on. A block then runs alone on any hidden states, so
that no other has to be in memory. A model without a stack of blocks counts as one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import SiteError
from veneer.sites.blocks import blocks

Batch = Mapping[str, Any]
HIDDEN = "hidden_states"  # the keyword by which transformers' blocks take them


class Entered(NamedTuple):
    """A batch at the first block: hidden (b, t, width), and the other arguments of every block's call."""

    hidden: Tensor
    calls: list[dict[str, Any]]
    rest: list[tuple[Any, ...]]


class Walk:
    """The blocks of one model, in eval mode. Raises SiteError for blocks whose forward was replaced."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        found = blocks(model)
        self.stacked = bool(found)
        self.blocks: list[nn.Module] = found or [model]
        names = {id(m): n for n, m in model.named_modules()}
        self.names = [names[id(b)] for b in self.blocks]
        held = [n for n, b in zip(self.names, self.blocks, strict=True) if "forward" in b.__dict__]
        if held:
            raise SiteError(f"blocks with a forward of their own cannot be compressed: {', '.join(held[:3])}")
        self._tuples: bool | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self, batch: Batch) -> Entered:
        """The hidden states (b, t, width) that enter the first block, and how every block is called.

        The first block runs once, for the form of its output.
        """
        if not self.stacked:
            return Entered(batch["x"] if "x" in batch else torch.empty(0), [dict(batch)], [()])
        entered: list[Tensor] = []
        calls: list[dict[str, Any]] = []
        rest: list[tuple[Any, ...]] = []

        def note(i: int, hidden: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
            if i == 0:
                entered.append(hidden)
            calls.append(given)
            rest.append(args)
            return hidden

        with self._replaced(note), torch.no_grad():
            self.model(**_inputs(batch))
        return Entered(entered[0], calls, rest)

    def run(self, i: int, hidden: Tensor, at: Entered) -> Tensor:
        """The hidden states (b, t, width) that leave block i for those that enter it."""
        if not self.stacked:
            return _first(self.model(**at.calls[0]))
        return _first(self.blocks[i](hidden, *at.rest[i], **at.calls[i]))

    def leave(self, hidden: Tensor, batch: Batch) -> Any:
        """The model's output where the last block gave `hidden`; gradients flow back to it."""
        if not self.stacked:
            raise SiteError("a model without a stack of blocks has no end of its own")
        last = len(self) - 1

        def inject(i: int, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
            return hidden if i == last else x

        with self._replaced(inject):
            return self.model(**_inputs(batch))

    @contextmanager
    def _replaced(self, act: Any) -> Iterator[None]:
        """Within the block every block of the model is act(i, hidden, other arguments, keywords)."""
        for i, block in enumerate(self.blocks):
            block.__dict__["forward"] = self._stand_in(i, block, act)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]

    def _stand_in(self, i: int, block: nn.Module, act: Any) -> Any:
        def forward(*args: Any, **given: Any) -> Any:
            if self._tuples is None:  # the form of a block's output is asked of the first one
                self._tuples = isinstance(type(block).forward(block, *args, **given), tuple)
            hidden, other = (args[0], args[1:]) if args else (given.pop(HIDDEN), ())
            made = act(i, hidden, other, given)
            return (made,) if self._tuples else made

        return forward


def _inputs(batch: Batch) -> dict[str, Any]:
    """Returns the entries of a batch that a language model reads."""
    return {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
