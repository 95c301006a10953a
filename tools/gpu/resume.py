"""A run on the device that is killed and resumed, against one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import veneer

RUN = """
import sys, veneer, json
veneer.fit(veneer.Run.from_dict(json.loads(sys.argv[1])), progress=False)
"""


def resume(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Losses of all steps, and the adapter's numbers at the end.

    tiny: small steps; what is not killed runs in this process, as a process takes longer to start.
    """
    finish = _finished_here if tiny else _finish
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("the cat sat on a mat and looked at the moon. " * 400)
        small = {"length": 16, "eval_windows": 2} if tiny else {}
        whole, cut = ({**_settings(folder, device, out), **small} for out in ("whole", "cut"))
        finish(whole)
        process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(cut)])
        _kill(process, folder / "cut")
        finish({**cut, "resume": True})
        a, b = (_losses(folder / out) for out in ("whole", "cut"))
        off = max((abs(x - y) for x, y in zip(a, b, strict=False)), default=1.0)
        problems = (
            [] if a and len(a) == len(b) and off < 1e-3 else [f"{len(a)}, {len(b)} steps, {off:.2g} off"]
        )
        return {"resume_loss_off": off, "resume_identical": float(a == b), "problems": problems}


def _settings(folder: Path, device: str, out: str) -> dict[str, Any]:
    given = {"model": "builtin", "data": [str(folder / "text.txt")], "known": ["none"], "steps": 30}
    given |= {"batch": 2, "length": 64, "save_every": 3, "report": False, "compile": "off", "device": device}
    return {**given, "lr": 1e-3, "out": str(folder / out)}


def _finish(given: dict[str, Any]) -> None:
    subprocess.run([sys.executable, "-c", RUN, json.dumps(given)], check=True, capture_output=True)


def _finished_here(given: dict[str, Any]) -> None:
    veneer.fit(veneer.Run.from_dict(given), progress=False)


def _kill(process: subprocess.Popen[bytes], folder: Path, patience: float = 60.0) -> None:
    """Kills the run once a checkpoint of it is there."""
    ends = time.monotonic() + patience
    while time.monotonic() < ends and process.poll() is None:
        if any((folder / "checkpoints").glob("*")) if (folder / "checkpoints").is_dir() else False:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()


def _losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row and "lr" in row]
