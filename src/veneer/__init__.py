"""Thin low-rank layers over large models: adapt, train, merge, save, and see what was learned and forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.adapt.algebra import combine, extract, to_lora
from veneer.adapt.attach import activate, active, adapters, attach, detach, train_only, using
from veneer.adapt.merge import merge
from veneer.adapt.store import load, save

if TYPE_CHECKING:
    from veneer.app.fit import fit
    from veneer.train.run import Run

__version__ = "0.1.0"
__all__ = [
    "Run",
    "activate",
    "active",
    "adapters",
    "attach",
    "combine",
    "detach",
    "extract",
    "fit",
    "load",
    "merge",
    "save",
    "to_lora",
    "train_only",
    "using",
]

# Names that are imported when they are first used, so that `import veneer` stays quick.
_LATE = {"Run": "veneer.train.run", "fit": "veneer.app.fit"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATE[name]), name)
