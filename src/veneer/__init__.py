"""Thin low-rank layers over large models: adapt, train, merge, save, and see what was learned and forgotten."""

from __future__ import annotations

from veneer.adapt.attach import activate, active, adapters, attach, detach, train_only, using
from veneer.adapt.store import load, save

__version__ = "0.1.0"
__all__ = ["activate", "active", "adapters", "attach", "detach", "load", "save", "train_only", "using"]
