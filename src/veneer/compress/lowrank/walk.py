"""Runs the blocks of a model one at a time on hidden states that are kept between them.

The model's own forward decides what every block is called with (masks, positions): it runs once with blocks
that only note their arguments and pass the hidden states on. A block then runs alone on any hidden states, so
that no other has to be in memory. A model without a stack of blocks counts as one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.errors import SiteError, first_few
from veneer.ops.matrix.linalg import precise
from veneer.sites.blocks import blocks

Batch = Mapping[str, Any]
HIDDEN = "hidden_states"  # the keyword by which transformers' blocks take them
IGNORED = -100
Once = dict[int, tuple[Tensor, Tensor]]
Act = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class Entered(NamedTuple):
    """A batch at the first block: hidden (b, t, width), and the other arguments of every block's call.

    mask (b, t) is True where a token counts, None where all do.
    """

    hidden: Tensor
    rest: list[tuple[Any, ...]]
    named: list[dict[str, Any]]
    mask: Tensor | None

    def run(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Returns the hidden states (b, t, width) that block i makes of those that enter it."""
        output = block(hidden, *self.rest[i], **self.named[i])
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


class Walk:
    """The blocks of one model, in eval mode. Raises SiteError if it has no stack of them, or replaced
    forwards.

    first: opens the first block with its weights.

    """

    def __init__(self, model: nn.Module, first: Callable[[], AbstractContextManager[nn.Module]]) -> None:
        self.model, self.first = model, first
        self.blocks = blocks(model)
        if not self.blocks:
            raise SiteError(
                f"a {type(model).__name__} has no stack of blocks, which compression works through"
            )
        names = {id(m): n for n, m in model.named_modules()}
        self.names = [names[id(b)] for b in self.blocks]
        held = [n for n, b in zip(self.names, self.blocks, strict=True) if "forward" in b.__dict__]
        if held:
            raise SiteError(f"{first_few(held)}: blocks with a forward of their own cannot be compressed")
        self._tuples: bool | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def enter(self, batch: Batch) -> Entered:
        """Returns a batch at the first block, which runs once for the form of its output. Floats are made
        precise.
        """
        entered: list[Tensor] = []
        rest: list[tuple[Any, ...]] = []
        named: list[dict[str, Any]] = []
        once: Once = {}

        def note(i: int, hidden: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
            entered.append(hidden)
            rest.append(_precise(args, once))
            named.append(_precise(given, once))
            return hidden

        with self._replaced(note):
            self.model(**_inputs(batch))
        return Entered(precise(entered[0].detach()), rest, named, mask_of(batch))

    def leave(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Returns the model's logits where the last block gives `hidden`; gradients flow back to it."""
        last = len(self) - 1

        def inject(i: int, x: Tensor, args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
            return hidden.to(x.dtype) if i == last else x

        with self._replaced(inject):
            output = self.model(**_inputs(batch))
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    @contextmanager
    def _replaced(self, act: Act) -> Iterator[None]:
        """Within the block every block of the model is `act(i, hidden, other arguments, keywords)`."""
        for i, block in enumerate(self.blocks):
            block.__dict__["forward"] = self._stand_in(i, block, act)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]

    def _gives_tuples(self, args: tuple[Any, ...], given: dict[str, Any]) -> bool:
        """Returns True if the first block returns the hidden states within a tuple."""
        with self.first() as block:
            return isinstance(type(block).forward(block, *_precise(args, {}), **_precise(given, {})), tuple)

    def _stand_in(self, i: int, block: nn.Module, act: Act) -> Callable[..., Any]:
        def forward(*args: Any, **given: Any) -> Any:
            if self._tuples is None:
                self._tuples = self._gives_tuples(args, given)
            hidden, other = (args[0], args[1:]) if args else (given.pop(HIDDEN), ())
            made = act(i, hidden, other, given)
            return (made,) if self._tuples else made

        return forward


def mask_of(batch: Batch) -> Tensor | None:
    """Returns True where a token counts (b, t): by the attention mask, else by the labels; None where all
    count.
    """
    if batch.get("attention_mask") is not None:
        return batch["attention_mask"] != 0  # type: ignore[no-any-return]
    if batch.get("labels") is not None and batch["labels"].shape == batch["input_ids"].shape:
        return batch["labels"] != IGNORED  # type: ignore[no-any-return]
    return None


def _inputs(batch: Batch) -> dict[str, Any]:
    """Returns the entries of a batch that a language model reads."""
    return {**{k: v for k, v in batch.items() if k != "labels"}, "use_cache": False}


def _precise(given: Any, once: Once) -> Any:
    """The arguments with floating tensors in float32 at least, in tuples and dictionaries too.

    once: by id, what was made of a tensor before, as blocks are called with the same masks and positions.
    """
    if isinstance(given, Tensor):
        if id(given) not in once:
            made = precise(given.detach()) if given.is_floating_point() else given
            once[id(given)] = (given, made)  # the original is held, so that no other gets its id
        return once[id(given)][1]
    if isinstance(given, tuple):
        return tuple(_precise(v, once) for v in given)
    return {k: _precise(v, once) for k, v in given.items()} if isinstance(given, dict) else given
