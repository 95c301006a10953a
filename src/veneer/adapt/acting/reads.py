"""Finds layers that are not called because their owner reads their parameters itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.adapt.attached import layers


class _Recorded(dict[str, Any]):
    """A module's parameters, which note every access, and whether the module was called."""

    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__(own)
        self.own = own
        self.was_read = self.was_called = False

    def __getitem__(self, name: str) -> Any:
        self.was_read = True
        found = super().__getitem__(name)
        on_disk = isinstance(found, Tensor) and found.is_meta
        return self.own[name] if on_disk else found  # the own one reads a block from its file


@contextmanager
def watching_reads(model: nn.Module) -> Iterator[list[str]]:
    """Watches calls of the model within the block; the list then holds layers that were read directly.

    Those are adapted layers whose parameters were read and that were not called. A read for the dtype alone
    beside a call (T5's) does not count.
    """
    found: list[str] = []
    watched = [_watch(d.site.module) for d in layers(model) if d.site.acts_by_hook]
    names = [d.site.name for d in layers(model) if d.site.acts_by_hook]
    try:
        yield found
    finally:
        for name, (module, own, recorded, handle) in zip(names, watched, strict=True):
            handle.remove()
            module._parameters = own
            if recorded.was_read and not recorded.was_called:
                found.append(name)


def _watch(module: nn.Module) -> tuple[nn.Module, dict[str, Any], _Recorded, RemovableHandle]:
    own: dict[str, Any] = module._parameters
    recorded = _Recorded(own)

    def begins(*event: Any) -> None:
        recorded.was_called = True

    handle = module.register_forward_pre_hook(begins)
    module._parameters = recorded
    return module, own, recorded, handle
