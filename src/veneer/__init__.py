"""Thin low-rank layers over large models: adapt, train, merge, save, and see what was learned and
forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from veneer.version import __version__ as __version__

if TYPE_CHECKING:
    from veneer.adapt.attach import attach, detach
    from veneer.adapt.attached import active, adapters
    from veneer.adapt.banks.make import bank
    from veneer.adapt.calibrate import calibrate
    from veneer.adapt.combine import combine, extract, to_lora
    from veneer.adapt.merge import merge
    from veneer.adapt.store.store import load, read, save
    from veneer.adapt.switch import activate, train_only, using
    from veneer.adapt.tokens.add import add_tokens, resize_vocabulary
    from veneer.compress.compress import compress
    from veneer.compress.folder import save_compressed
    from veneer.compress.quantise import dequantise, quantise, quantise_around
    from veneer.compress.store import load_quantised, save_quantised
    from veneer.compress.trp.trp import TRP
    from veneer.models.compressed import load_compressed
    from veneer.models.expand import expand
    from veneer.runs.fit import fit
    from veneer.runs.fit_many import fit_many
    from veneer.serve.start import serve
    from veneer.train.run import Run

__all__ = [
    "TRP",
    "Run",
    "activate",
    "active",
    "adapters",
    "add_tokens",
    "attach",
    "bank",
    "calibrate",
    "combine",
    "compress",
    "dequantise",
    "detach",
    "expand",
    "extract",
    "fit",
    "fit_many",
    "load",
    "load_compressed",
    "load_quantised",
    "merge",
    "quantise",
    "quantise_around",
    "read",
    "resize_vocabulary",
    "save",
    "save_compressed",
    "save_quantised",
    "serve",
    "to_lora",
    "train_only",
    "using",
]

# Where every name lives. They are imported when they are first used, so that `veneer --help` need not load
# PyTorch.
_HOMES = {
    "veneer.adapt.combine": ("combine", "extract", "to_lora"),
    "veneer.adapt.attach": ("attach", "detach"),
    "veneer.adapt.tokens.add": ("add_tokens", "resize_vocabulary"),
    "veneer.adapt.attached": ("active", "adapters"),
    "veneer.adapt.banks.make": ("bank",),
    "veneer.adapt.calibrate": ("calibrate",),
    "veneer.adapt.merge": ("merge",),
    "veneer.adapt.store.store": ("load", "read", "save"),
    "veneer.adapt.switch": ("activate", "train_only", "using"),
    "veneer.runs.fit": ("fit",),
    "veneer.runs.fit_many": ("fit_many",),
    "veneer.models.expand": ("expand",),
    "veneer.compress.folder": ("save_compressed",),
    "veneer.models.compressed": ("load_compressed",),
    "veneer.compress.trp.trp": ("TRP",),
    "veneer.compress.store": ("load_quantised", "save_quantised"),
    "veneer.compress.quantise": ("dequantise", "quantise", "quantise_around"),
    "veneer.serve.start": ("serve",),
    "veneer.train.run": ("Run",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None and name != "compress":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if home is None:  # a package that is called, see veneer.compress
        return importlib.import_module("veneer.compress")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
