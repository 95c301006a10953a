"""Fetches and converts real models and data: python -m real [KEY ...] (make real KEYS="smollm2 minilm")."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from real.fetch import RealError, fetch
from real.table import ENTRIES, KEYS, Entry
from veneer.files import sha256

ROOT = Path(__file__).resolve().parents[2]


def cache() -> Path:
    """Returns the folder that holds everything: $VENEER_REAL, or .real in the checkout."""
    return Path(os.environ.get("VENEER_REAL") or ROOT / ".real")


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the entries that are missing; exit code 1 if one failed, 2 for an unknown key."""
    parser = argparse.ArgumentParser(prog="python -m real", description=__doc__)
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help=f"which of them (default: all): {', '.join(KEYS)}"
    )
    parser.add_argument("--list", action="store_true", help="list the entries with their licences and stop")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.keys) - set(KEYS))
    if unknown:
        parser.error(f"unknown key {', '.join(unknown)}; the keys are {', '.join(KEYS)}")
    chosen = [e for e in ENTRIES if not args.keys or e.key in args.keys]
    if args.list:
        for entry in chosen:
            print(f"{entry.key:<10} {entry.what} [{entry.licence}]")
        return 0
    return max([make(entry, cache()) for entry in chosen], default=0)


def make(entry: Entry, folder: Path) -> int:
    """Makes one entry unless its OK file is there; prints one line; 1 if it failed."""
    out = folder / entry.key
    if (out / "OK").is_file():
        print(f"{entry.key}: ready in {out}")
        return 0
    began = time.monotonic()
    try:
        _make(entry, folder, out)
    except (RealError, OSError, ValueError) as e:
        print(f"{entry.key}: failed: {e}", file=sys.stderr)
        return 1
    print(f"{entry.key}: made in {time.monotonic() - began:.0f} s: {out} ({entry.what})")
    return 0


def _make(entry: Entry, folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{entry.key}-") as temporary:
        unpacked, made = Path(temporary) / "unpacked", Path(temporary) / "made"
        unpacked.mkdir()
        fetch(entry, folder, unpacked)
        if entry.convert:
            importlib.import_module(f"real.{entry.convert}").convert(unpacked, made)
        else:
            made = unpacked
        sums = {p.relative_to(made).as_posix(): sha256(p) for p in sorted(made.rglob("*")) if p.is_file()}
        facts = {"what": entry.what, "licence": entry.licence, "packages": [d[:3] for d in entry.downloads]}
        (made / "OK").write_text(json.dumps({**facts, "sha256": sums}, indent=1) + "\n", encoding="utf-8")
        made.rename(out)


if __name__ == "__main__":
    sys.exit(main())
