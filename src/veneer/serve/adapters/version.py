"""One content of an adapter: what a request holds on to while the name may already stand for another."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from veneer.adapt.banks.rows import Form
from veneer.adapt.banks.stacks import Placed
from veneer.sites import Site

Forms = Mapping[str, tuple[Site, Form]]


class Version:
    """An adapter's content under its hash.

    forms: its normal forms, None while they are on the disk only; placed: its place in the bank, None without
    one; running: requests that compute with it now; holds: requests that will; retired: its name stands for
    another content.
    """

    def __init__(self, name: str, content: str, forms: Forms | None, folder: Path | None) -> None:
        self.name, self.content, self.folder = name, content, folder
        self.forms = forms
        self.placed: Placed | None = None
        self.running = self.holds = 0
        self.lock = threading.Lock()
        self.pinned = self.retired = self.draining = False
        self.finite = True
        self.bytes = 0 if forms is None else size(forms)
        self.error: str | None = None  # why its forms could not be read again

    def hold(self, n: int = 1) -> None:
        """Counts requests that will compute with it; safe for threads. n: -1 ends a hold."""
        with self.lock:
            self.holds += n

    @property
    def is_idle(self) -> bool:
        """True if its place in the bank may be given to another."""
        return not self.running and not self.pinned


def size(forms: Forms) -> int:
    """Returns the bytes of an adapter's normal forms."""
    return sum(
        t.numel() * t.element_size()
        for _, form in forms.values()
        for part in (form.factors, form.products or ())
        for t in part
        if t is not None
    )
