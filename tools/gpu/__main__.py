"""Runs every part in a process of its own under its limit, and prints one JSON line with the device.

    python -m gpu [--device cuda|cpu] [--tiny] [--part NAME ..] [--out FILE]

Results are written after every part, so that a card that is taken away leaves those before it. Exit code: 0,
also without a card; 3 if a part failed. --tiny: sizes for a processor, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.parts import PARTS, TOTAL, Skipped

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "bench" / "results" / "gpu.json"
MARK = "gpu part: "  # begins the line of a part's result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; nothing is written without --out")
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="this part alone")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        return child(given.child, given.device, tiny=given.tiny)
    if given.device == "cuda" and not _has_card():
        print("no GPU here: PyTorch sees no CUDA device; nothing was run")
        return 0
    out = given.out or (None if given.tiny else OUT)
    line = round_of(given.part or list(PARTS), given.device, tiny=given.tiny, seconds=given.seconds, out=out)
    print(json.dumps(line), flush=True)
    return 3 if any(p["outcome"] in ("failed", "timeout") for p in line["parts"].values()) else 0


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def round_of(
    names: Sequence[str], device: str, *, tiny: bool, seconds: float, out: Path | None
) -> dict[str, Any]:
    """Returns the line of a round: figures of all parts, and the outcome of each."""
    line: dict[str, Any] = {"bench": "gpu", "device": device_name(device), "versions": versions()}
    line |= {"figures": {}, "parts": {}}
    ends = time.monotonic() + seconds
    for name in names:
        left = ends - time.monotonic()
        found = run_part(name, device, tiny=tiny, seconds=min(PARTS[name].seconds, left))
        line["figures"] |= found.pop("figures", {})
        line["parts"][name] = found
        print(f"{name}: {found['outcome']} ({found['seconds']} s) {found.get('text', '')}", file=sys.stderr)
        if out is not None:
            temporary = out.with_suffix(".part")
            temporary.write_text(json.dumps(line) + "\n", encoding="utf-8")
            os.replace(temporary, out)
    return line


def run_part(name: str, device: str, *, tiny: bool, seconds: float) -> dict[str, Any]:
    """Returns a part's outcome: done, failed, skipped or timeout, with its text, seconds and figures."""
    if seconds <= 1:
        return {"outcome": "skipped", "text": "no time was left", "seconds": 0.0}
    command = [sys.executable, "-m", "gpu", "--child", name, "--device", device]
    begun = time.monotonic()
    paths = (str(ROOT / "tools"), str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(
            command + (["--tiny"] if tiny else []),
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "timeout", "text": f"over {seconds:.0f} s", "seconds": round(seconds, 1)}
    taken = round(time.monotonic() - begun, 1)
    for row in reversed(done.stdout.splitlines()):
        if row.startswith(MARK):
            return {**json.loads(row.removeprefix(MARK)), "seconds": taken}
    last = (done.stderr.strip().splitlines() or [""])[-1][:300]
    return {"outcome": "failed", "text": f"exit code {done.returncode}: {last}", "seconds": taken}


def child(name: str, device: str, *, tiny: bool) -> int:
    """Runs one part in this process, and prints its result as one line."""
    part = PARTS[name]
    try:
        figures: dict[str, Any] = part.function()(device, tiny=tiny, **part.arguments)
        problems: list[str] = figures.pop("problems", [])
        found: dict[str, Any] = {"outcome": "failed" if problems else "done", "figures": figures}
        found |= {"text": "; ".join(problems)[:2000]} if problems else {}
    except Skipped as e:
        found = {"outcome": "skipped", "text": str(e)}
    except Exception as e:
        traceback.print_exc()
        found = {"outcome": "failed", "text": f"{type(e).__name__}: {e}"[:2000]}
    print(MARK + json.dumps(found), flush=True)
    return 0


def device_name(device: str) -> str:
    import torch

    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"
    return "cpu"


def versions() -> dict[str, str]:
    """Returns the versions of the packages that the figures depend on."""
    import importlib.metadata as metadata
    import platform

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "torchao", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
