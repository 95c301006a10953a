"""Bytes of a training by part, counted on tensors, against the prediction of `plan` from shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from veneer.runs.fit import fit
from veneer.train.loop.step import Learner
from veneer.train.run import Run
from veneer.verbs.plan.plan import plan

PARTS = ("weights", "adapter", "gradients", "optimiser", "activations")


def settings(method: str, out: str) -> Run:
    """Returns the run that is foretold and taken: of the built-in model, and on its four bits for qlora."""
    packed: Any = "nf4" if method == "qlora" else None
    name = method.removeprefix("q")
    return Run(
        data=("builtin:prose",), method=name, quantise=packed, steps=8, eval_every=100, device="cpu", out=out
    )


def parts(run: Run) -> dict[str, tuple[int, int]]:
    """Returns bytes by part, foretold without a probe, and the most that a step of the run has."""
    foretold, real = plan(run, probe=False, progress=False).memory, taken(run)
    return {part: (getattr(foretold, part), real[part]) for part in PARTS}


def taken(run: Run) -> dict[str, int]:
    """Returns the most bytes of each part in the steps of this run, which trains an adapter."""
    most: Counter[str] = Counter()
    step, finish = Learner.step, Learner.finish

    def enter(**found: int) -> None:
        for part, n in found.items():
            most[part] = max(most[part], n)

    def watched(self: Learner, *given: Any) -> Any:
        own = [*self.model.parameters(), *self.model.buffers()]
        kept = Kept(own)
        with torch.autograd.graph.saved_tensors_hooks(kept.hold, lambda held: held.tensor):
            outcome = step(self, *given)
        adapter = size(p.parameter for p in self.parts)
        states = [t for state in self.optimiser.state.values() for t in state.values()]
        enter(weights=size(own) - adapter, adapter=adapter, optimiser=size(states), activations=kept.most)
        return outcome

    def finished(self: Learner, *given: Any) -> Any:
        enter(gradients=size(p.parameter.grad for p in self.parts if p.parameter.grad is not None))
        return finish(self, *given)

    with mock.patch.object(Learner, "step", watched), mock.patch.object(Learner, "finish", finished):
        fit(run, progress=False)
    return most


def size(tensors: Iterable[Tensor]) -> int:
    """Returns bytes of the tensors' storages, each once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class Kept:
    """Counts storages that autograd keeps for the backward, without `own`, each once."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self._holders: Counter[int] = Counter()
        self.now = self.most = 0

    def hold(self, t: Tensor) -> Held:
        """Returns the holder that a node keeps in place of t."""
        return Held(t, self)

    def enter(self, t: Tensor, holders: int) -> None:
        """Takes note that the tensor has one holder more, or less."""
        storage = t.untyped_storage()
        key, before = storage.data_ptr(), self._holders[storage.data_ptr()]
        self._holders[key] += holders
        if key not in self._own and 0 in (before, self._holders[key]):
            self.now += holders * storage.nbytes()
            self.most = max(self.most, self.now)


class Held:
    """A tensor that a node keeps."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self.tensor, self._kept = tensor, kept
        kept.enter(tensor, 1)

    def __del__(self) -> None:
        self._kept.enter(self.tensor, -1)
