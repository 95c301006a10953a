"""Counts the types of PEFT's adapters that open with PEFT's outputs, out of all that PEFT can save.

Every type is saved by PEFT on a tiny Llama, away from its start, opened by `veneer.load` or through PEFT's
merge, and compared with PEFT's outputs (1e-5 of their size). Types that are refused, as no change of weights,
are not counted.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
CLOSE = 1e-5


def peft_types() -> dict[str, float]:
    """Returns the numbers of types that open, by themselves and through PEFT, and the largest error."""
    from support.peft_types import SETTINGS

    from veneer.adapt.peft.types import every

    warnings.simplefilter("ignore")  # of PEFT, about its own types
    errors = {t: opened(t, way.by == "convert") for t, way in every().items() if way.by != "no"}
    good = {t for t, error in errors.items() if error <= CLOSE}
    for name in sorted(set(errors) - good):
        print(f"{name}: {errors[name]:.1e}")
    return {
        "peft_types": len(SETTINGS),
        "peft_types_opened": len(good),
        "peft_types_opened_directly": sum(every()[t].by == "load" for t in good),
        "peft_types_error": max(errors.values()),
    }


def opened(peft_type: str, through_peft: bool) -> float:
    """Returns the error of the outputs relative to PEFT's, or infinity where the adapter does nothing."""
    from support import models, peft_types

    import veneer
    from veneer.adapt import hooks
    from veneer.convert.merged.opening import to_changes

    with tempfile.TemporaryDirectory() as place:
        folder, model = Path(place) / "adapter", models.llama()
        wanted = peft_types.saved(peft_type, models.llama(), folder)
        assert wanted is not None
        before = peft_types.outputs(model)
        if through_peft:
            task = peft_types.TASK if peft_type == "POLY" else None
            hooks.hang(model, "default", to_changes(model, folder, task))
        else:
            veneer.load(model, folder)
        moved, error = (
            float((y - wanted).norm() / wanted.norm()) for y in (before, peft_types.outputs(model))
        )
    return error if moved > 1e-3 else float("inf")
