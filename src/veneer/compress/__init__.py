"""Compresses models: layers in fewer bits or with fewer numbers; `veneer.compress(model)` by low rank."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called as its function of the same name, so that both may be `veneer.compress`."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        from veneer.compress.compress import compress

        return compress(*args, **given)

    @property
    def __signature__(self) -> inspect.Signature:
        from veneer.compress.compress import compress

        return inspect.signature(compress)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        from veneer.compress.compress import compress

        return compress.__doc__


sys.modules[__name__].__class__ = _Callable
