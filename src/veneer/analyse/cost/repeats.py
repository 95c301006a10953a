"""Runs one block of each kind and counts it as often as its kind occurs: 80 blocks cost as little as two.

A forward and backward pass is cut into stretches at the entries of the model's blocks and at the gradients of
what enters them. A block like an earlier one hands its input on unchanged, and the earlier block's stretches
stand in for its own. No sum is extrapolated: the stretches are laid end to end, so that sums and peaks equal
those of the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from veneer.adapt.acting.forward import Deltas
from veneer.analyse.cost.memory import Ledger, Rise
from veneer.sites.blocks import stack

OWN_PLACE = (
    "idx",
    "index",
    "layer_id",
    "layer_number",
    "seed",
)  # attributes that may differ between like blocks
SCALARS = (bool, int, float, str, type(None))


class Stretch(NamedTuple):
    """Bytes made, bytes kept for the backward, and counts of operations between two marks."""

    made: Rise
    kept: Rise
    counts: tuple[int, ...]


def joined(stretches: Iterable[Stretch]) -> Stretch:
    """Returns the one stretch that these make, one after the other."""
    every = list(stretches)
    counts = tuple(map(sum, zip(*(s.counts for s in every), strict=True)))
    return Stretch(_end_to_end(s.made for s in every), _end_to_end(s.kept for s in every), counts)


def _end_to_end(rises: Iterable[Rise]) -> Rise:
    now = high = 0
    for rise in rises:
        high = max(high, now + rise.high)
        now += rise.net
    return Rise(now, high)


class Again(NamedTuple):
    """Names the stretch of one call of a block, by its number and direction."""

    call: int
    direction: str


class Like(NamedTuple):
    """A call that others repeat: its number, and how many None follow the hidden states in a tuple."""

    call: int
    behind: int | None

    def output(self, hidden: Tensor) -> Any:
        """Returns the hidden states as the block would."""
        return hidden if self.behind is None else (hidden, *[None] * self.behind)


class Repeats:
    """Watches a pass through a model's blocks, and runs only the first of several calls alike.

    counts: returns the operations counted so far; ready: is called with every block before it runs.
    """

    def __init__(
        self,
        made: Ledger,
        kept: Ledger,
        counts: Callable[[], tuple[int, ...]],
        ready: Callable[[nn.Module], None],
    ) -> None:
        self._made, self._kept, self._counts, self._ready = made, kept, counts, ready
        self._counted = counts()
        self._script: list[Stretch | Again] = []
        self._own: dict[Again, Stretch] = {}
        self._kinds: dict[Any, Like] = {}
        self._skipped: dict[int, list[int]] = {}  # calls skipped behind one that ran: what they are like
        self._ran = self._calls = -1  # the last call that ran, and the last of all
        self._running: Again | None = None

    def found(self) -> Stretch:
        """Returns everything from the beginning as one stretch, skipped calls included."""
        self._mark(None)
        return joined(self._own[s] if isinstance(s, Again) else s for s in self._script)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watches the model's blocks within the block; twins that share all tensors take their places."""
        blocks = stack(model)
        own = {} if blocks is None else dict(blocks._modules)
        twins = {n: _twin(m, self._call) for n, m in own.items() if m is not None}
        try:
            if blocks is not None:
                blocks._modules.update(twins)
            yield
        finally:
            if blocks is not None:
                blocks._modules.update(own)

    @contextmanager
    def counted(self, times: float) -> Iterator[None]:
        """Counts the operations within the block so many times, and their memory once."""
        self._mark(None)
        try:
            yield
        finally:
            self._mark(None)
            *_, one = self._script
            assert isinstance(one, Stretch)
            self._script[-1] = one._replace(counts=tuple(round(times * n) for n in one.counts))

    def _call(
        self, block: nn.Module, run: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._calls += 1
        hidden = args[0] if args and isinstance(args[0], Tensor) else None
        self._expect(hidden)
        kind = None if hidden is None else (_signature(block), _outline((args, kwargs)))
        like = self._kinds.get(kind)
        if like is not None and hidden is not None:
            self._mark(None)
            self._script.append(Again(like.call, "forward"))
            self._skipped[self._ran].append(like.call)
            return like.output(hidden)
        first, self._ran = self._ran < 0, self._calls
        self._skipped[self._ran] = []
        self._mark(Again(self._calls, "forward"))
        self._ready(block)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t is not hidden]
        before = [t in self._kept for t in given]
        out = run()
        # The first block, and one that is the first to keep what all are given, takes what no later one does.
        if hidden is not None and not first and before == [t in self._kept for t in given]:
            found = _hands_on(self._ran, hidden, out)
            if found is not None:
                self._kinds[kind] = found
        return out

    def _expect(self, hidden: Tensor | None) -> None:
        """Marks the moment at which the gradient of what the last call that ran returned is complete."""
        below = self._ran
        if hidden is not None and hidden.requires_grad and not self._skipped.get(below):
            hidden.register_hook(lambda gradient: self._reached(below))

    def _reached(self, below: int) -> None:
        self._mark(None)
        likes = reversed(self._skipped.get(below, []))
        self._script += [Again(like, "backward") for like in likes]
        self._running = None if below < 0 else Again(below, "backward")

    def _mark(self, following: Again | None) -> None:
        """Ends a stretch and begins the next one."""
        counts = self._counts()
        took = tuple(n - m for n, m in zip(counts, self._counted, strict=True))
        stretch = Stretch(self._made.lap(), self._kept.lap(), took)
        self._script.append(stretch)
        if self._running is not None:
            self._own[self._running] = stretch
        self._counted, self._running = counts, following


def _signature(module: nn.Module) -> Any:
    """Returns what decides the cost of a module."""
    children = tuple((name, m if m is None else _signature(m)) for name, m in module._modules.items())
    return _described(module), children


def _described(module: nn.Module) -> Any:
    scalars = [
        (name, value)
        for name, value in module.__dict__.items()
        if isinstance(value, SCALARS) and not any(word in name for word in OWN_PLACE)
    ]
    tensors = [
        (name, t if t is None else (t.shape, t.dtype, t.requires_grad))
        for owned in (module._parameters, module._buffers)
        for name, t in owned.items()
    ]
    acting = tuple(module.active.items()) if isinstance(module, Deltas) else ()
    return type(module), tuple(scalars), tuple(tensors), acting


def _outline(arguments: Any) -> Any:
    """Returns shapes and dtypes of a call's tensors, and whether they take gradients."""
    return tuple(
        (t.shape, t.dtype, t.requires_grad) if isinstance(t, Tensor) else type(t)
        for t in tree_leaves(arguments)
    )


def _hands_on(call: int, hidden: Tensor, out: Any) -> Like | None:
    """Returns the form in which a block returns hidden states, or None if it returns anything else."""
    first, rest = (out[0], out[1:]) if isinstance(out, tuple) and out else (out, None)
    if not isinstance(first, Tensor) or (first.shape, first.dtype) != (hidden.shape, hidden.dtype):
        return None
    if rest is None:
        return Like(call, None)
    return Like(call, len(rest)) if all(entry is None for entry in rest) else None


def _twin(block: nn.Module, call: Callable[..., Any]) -> nn.Module:
    """Returns a copy that shares everything with the block, and whose calls go through `call`."""
    kind = type(block)

    def through(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(block, lambda: kind.__call__(self, *args, **kwargs), args, kwargs)

    twin = copy.copy(block)
    twin.__class__ = type(kind.__name__, (kind,), {"__call__": through})
    return twin
