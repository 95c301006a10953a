"""Shared by the sweeps over learning rates: arguments, cached figures, and the last line."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.models import machine

Row = dict[str, float]


def arguments(doc: str | None, bench: str, **labels: Sequence[str]) -> argparse.Namespace:
    """`out`, a folder that is there; `write`; and by each name of `labels` those that are given, or all."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, every in labels.items():
        parser.add_argument(name, nargs="*", default=every)
    parser.add_argument("--out", type=Path, default=Path("runs") / bench)
    parser.add_argument("--write", action="store_true", help="keep the outcome in bench/results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def kept(file: Path, measure: Callable[[Path], Row]) -> Row:
    """Returns the figures of `measure`, run in a temporary folder, or those cached in the file."""
    if not file.exists():
        work = file.with_name("work")
        shutil.rmtree(work, ignore_errors=True)
        file.write_text(json.dumps(measure(work)))
        shutil.rmtree(work, ignore_errors=True)
    found: Row = json.loads(file.read_text())
    return found


def conclude(
    bench: str, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]], *, write: bool
) -> None:
    """Prints the JSON line, and keeps it in bench/results where that is wanted."""
    line = {"bench": bench, "device": "cpu", "versions": machine.versions(), "figures": figures, "rows": rows}
    if write:
        (Path(__file__).parent / "results" / f"{bench}.json").write_text(json.dumps(line, indent=1) + "\n")
    print(json.dumps(line))
