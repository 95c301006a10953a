"""Trainings by the command line under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(given: dict[str, Any], *launcher: str, verb: str = "fit", **environment: str) -> Any:
    """Starts `torchrun .. -m veneer fit` with the settings as flags."""
    config = Path(given["out"]).with_suffix(".yaml")
    config.write_text(json.dumps(given), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    more = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [*command, "--nproc-per-node", "2", *launcher, "-m", "veneer", verb, "--config", str(config)],
        env={**more, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
