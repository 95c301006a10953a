"""Serves any mixture of adapters in one batch; `veneer.serve(model, adapters)` starts a server."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """The package itself, which can be called: `veneer.serve` names both the function and its files."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from veneer.serve.start import serve

        return serve(*args, **options)


sys.modules[__name__].__class__ = _Room
