"""Changes of other programs that need the base's layers: PEFT's own merge, and LyCORIS's diag-OFT."""

from __future__ import annotations

from torch import nn

from veneer.adapt.attached import Changes
from veneer.convert.detect import Found
from veneer.convert.lycoris import turning
from veneer.convert.merged import opening


def kind(found: Found) -> str | None:
    """Returns the kind of a change that is read on the base's layers, in words, or None."""
    if found.dialect == "peft" and opening.opens(found.config):
        return f"PEFT's {found.config['peft_type']}"
    return "LyCORIS's diag-OFT" if found.dialect == "kohya" and turning.holds(found.file) else None


def to_changes(model: nn.Module, found: Found, task: int | None) -> Changes:
    """Returns the adapter as deltas of the model's layers, not attached. task: of PEFT's POLY."""
    if found.dialect == "kohya":
        return turning.to_changes(model, found.file)
    return opening.to_changes(model, found.folder, task)
