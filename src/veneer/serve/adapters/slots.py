"""Places in the bank: given to adapters as requests need them, taken from the one idle for longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from veneer.adapt.banks.program import Terms
from veneer.adapt.banks.segments import SegmentBank
from veneer.serve.adapters.version import Version

Mixture = tuple[tuple[Version, float], ...]


class Slots:
    """At most `limit` adapters in the bank. A place is never given away while a request computes with it."""

    def __init__(self, bank: SegmentBank, limit: int) -> None:
        self.bank, self.limit = bank, limit
        self.placed: OrderedDict[int, Version] = OrderedDict()  # by id, least recently used first
        self.evictions = 0

    def acquire(self, mixture: Mixture) -> Terms | None:
        """Returns the places of all adapters of a sum, and holds them.

        Returns None, and changes nothing, while there is too little room or forms are missing in memory.
        """
        versions = [v for v, _ in mixture]
        if any(v.draining for v in versions if v.placed is not None):
            return None
        missing = {v: v.forms for v in versions if v.placed is None}
        if any(forms is None for forms in missing.values()):
            return None
        need = len(self.placed) + len(missing) - self.limit
        idle = [v for v in self.placed.values() if v.is_idle and v not in versions]
        if need > len(idle):
            return None
        for v in idle[: max(need, 0)]:
            self.remove(v)
            self.evictions += 1
        for v, forms in missing.items():
            assert forms is not None
            v.placed, v.finite = self.bank.put(forms)
            self.placed[id(v)] = v
        for v in versions:
            v.running += 1
            self.placed.move_to_end(id(v))
        return tuple((v.placed, s) for v, s in mixture if v.placed is not None)

    def release(self, mixture: Mixture) -> None:
        """Ends a request's hold; the place of a retired or draining version is then free."""
        for v, _ in mixture:
            v.running -= 1
            if not v.running and (v.retired or v.draining) and v.placed is not None:
                self.remove(v)

    def remove(self, version: Version) -> None:
        """Frees a version's place. The version must have no running request."""
        assert not version.running and version.placed is not None
        self.bank.drop(version.placed)
        del self.placed[id(version)]
        version.placed, version.draining = None, False

    def retire(self, version: Version) -> None:
        """Notes that a name no longer stands for this content; its place is free when its requests end."""
        version.retired, version.pinned = True, False
        if version.placed is not None and not version.running:
            self.remove(version)

    def drain(self, wanted: Sequence[Version]) -> None:
        """Lets one place become free: no further request takes the least used version, other than `wanted`,
        until then.
        """
        busy = [v for v in self.placed.values() if not v.pinned and v not in wanted]
        if busy and not any(v.draining for v in busy):
            min(busy, key=lambda v: v.running).draining = True
