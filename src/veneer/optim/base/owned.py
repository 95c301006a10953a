"""Pairs whose moments are as large as the weights are dealt out among processes: each steps its own for all.

After a step the owner's A and B replace those of the others: r (out + in) numbers a pair are exchanged, and
no other process keeps the moments, out x in numbers each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.optim.base.paired import Paired, Present

Share = Callable[[Sequence[Tensor], int], None]  # replaces tensors by those of a process


def owners(loads: Sequence[int], processes: int) -> list[int]:
    """Returns the process of each load: the largest first, each to the process with the least so far.

    >>> owners([4, 1, 1, 2], 2)
    [0, 1, 1, 1]
    """
    held, found = [0] * processes, [0] * len(loads)
    for i in sorted(range(len(loads)), key=lambda i: -loads[i]):
        found[i] = min(range(processes), key=held.__getitem__)
        held[found[i]] += loads[i]
    return found


class Owned(Paired, ABC):
    """Keeps the state of each pair in one process, with B; all processes must make every step."""

    rank, processes = 0, 1
    share: Share

    @abstractmethod
    def empty_state(self, A: nn.Parameter, B: nn.Parameter) -> dict[str, Tensor]:
        """Returns a pair's state before its first step, with the shapes and dtypes of later ones."""

    def divide(self, rank: int, processes: int, share: Share) -> None:
        """Deals the pairs out among the processes, by the sizes of their matrices."""
        self.rank, self.processes, self.share = rank, processes, share
        every = list(self._pairs())
        dealt = owners([B.shape[0] * A.shape[1] for A, B in every], processes)
        self._owner = {id(B): owner for (_, B), owner in zip(every, dealt, strict=True)}

    def holds(self, parameter: nn.Parameter) -> bool:
        """Tells if this process keeps the parameter's state."""
        return self.processes == 1 or self._owner.get(id(parameter), self.rank) == self.rank

    def is_dealt(self, parameter: nn.Parameter) -> bool:
        """Tells if one process keeps the parameter's state for all."""
        return self.processes > 1 and id(parameter) in self._owner

    def own(self, present: list[Present]) -> list[Present]:
        return [p for p in present if self.holds(p[1])]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps this process' pairs, then takes over those of the others."""
        super().step(closure)
        if self.processes == 1:
            return
        for owner in range(self.processes):
            factors = [t for A, B in self._pairs() if self._owner[id(B)] == owner for t in (A, B)]
            for dtype in dict.fromkeys(t.dtype for t in factors):
                self._take([t for t in factors if t.dtype == dtype], owner)

    def _take(self, factors: list[nn.Parameter], owner: int) -> None:
        flat = torch.cat([t.detach().reshape(-1) for t in factors])
        self.share([flat], owner)
        if owner != self.rank:
            for t, new in zip(factors, flat.split([t.numel() for t in factors]), strict=True):
                t.copy_(new.view(t.shape))

    @torch.no_grad()
    def gathered(self) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
        """Yields each B with its pair's state on the CPU in the first process, empty in the others.

        One state is on the wire at a time. All processes must run it to its end.
        """
        for A, B in self._pairs():
            state, blank = self.state.get(B, {}), self.empty_state(A, B)
            known = torch.tensor(float(bool(state)), device=B.device)
            self.share([known], self._owner[id(B)])
            if not known:
                continue
            whole = {key: state.get(key, t) for key, t in blank.items()}
            sent = {key: t.detach().to(B.device).contiguous() for key, t in whole.items()}
            self.share(list(sent.values()), self._owner[id(B)])
            yield B, {key: t.cpu() for key, t in sent.items()} if self.rank == 0 else {}

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for group in self.param_groups:
            if group["where"]:
                yield from zip(group["params"][::2], group["params"][1::2], strict=True)
