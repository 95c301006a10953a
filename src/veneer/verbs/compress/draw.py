"""Measures the curve of a model and writes its numbers, table and picture into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer import dtypes, embedded, files
from veneer.compress.lowrank.recipe import recipe
from veneer.data.spread import spread
from veneer.models import machine, pretrained
from veneer.train.loop.progress import Voice
from veneer.verbs.compress import curve_page
from veneer.verbs.compress.calibration import calibration, windows_of
from veneer.verbs.compress.curve import Setting, curve
from veneer.verbs.compress.options import Options

NUMBERS, TABLE, PICTURE = "curve.json", "curve.md", "curve.png"
TESTED = 40  # windows that every model is measured on
OWN_TEST = ("builtin:known:test",)


@dataclass(frozen=True)
class Drawn:
    """A curve: its folder, and what curve.json holds."""

    folder: str
    found: dict[str, Any]
    text: str

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, **self.found}


def draw(model: str, s: Options, changed: Mapping[str, Any]) -> Drawn:
    """Returns the curve of the model at the settings' ratios, kept in the folder `out`."""
    voice, where = Voice(s.progress), machine.device(s.device)
    tokenizer = pretrained.tokenizer(model)
    held = calibration(model, s, tokenizer, where)
    batches, windows = held.batches, held.windows
    if s.valid or model == embedded.PREFIX:
        tested = windows_of(s.valid or OWN_TEST, "test", model, s, tokenizer)
    else:  # a tenth of the windows, which are not calibrated on
        n = max(1, len(windows) // 10)
        tested, used = windows[:n], windows[n:]
        batches = held._replace(windows=used).in_batches(s.batch, where)
    kept = pretrained.config(model).dtype if s.dtype == "auto" else dtypes.of_name(s.dtype)
    recipes = {k: v for k, v in changed.items() if k != "keep"}
    found = curve(
        Setting(
            model=pretrained.causal_lm(model, torch.float32, where),
            dtype=kept or torch.float32,
            batches=batches,
            windows=spread(tested, TESTED),
            keeps=s.ratios(),
            recipe=lambda keep: recipe(s.method, keep, **recipes),
            work=Path(f"{s.out}.work"),
            seed=s.seed,
            say=voice.say,
        )
    )
    points = [p.as_dict() for p in found]
    content = {"model": model, "method": s.method, "device": machine.hardware(where), "dtype": str(kept)}
    return _written(Path(s.out), {**content, "points": points})


def _written(out: Path, content: dict[str, Any]) -> Drawn:
    points = content["points"]
    advice, table = curve_page.advice(points), curve_page.table(points)
    with files.making(out) as folder:
        files.write_json(folder / NUMBERS, content)
        (folder / TABLE).write_text(f"{table}\n\n{advice}\n", encoding="utf-8")
        curve_page.picture(points, folder / PICTURE)
    shutil.rmtree(f"{out}.work", ignore_errors=True)
    return Drawn(str(out), content, f"{table}\n\n{advice}\nwritten: {out / PICTURE}")
