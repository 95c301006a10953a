"""A new interpreter that finds this package, for what cannot be seen inside the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import veneer

SOURCE = Path(veneer.__file__).parent.parent


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter with these arguments and returns the finished process."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def printed(code: str, *arguments: str) -> str:
    """Returns the output of a program; fails the test if the program fails."""
    done = python("-c", code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
