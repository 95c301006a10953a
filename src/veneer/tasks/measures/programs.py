"""Runs a program that a model wrote: in a process of its own, with limits, without network.

These limits keep accidents small. They do not stop an attacker: run code of unknown models in a virtual
machine.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile

MEMORY = 1 << 30  # bytes of address space
OUTPUT = 300  # characters of an error that are kept

# Runs before the program, in its process: drops the network where the system lets it, limits memory, time,
# files and processes, and then refuses sockets, other processes and files outside the working directory.
GUARD = """
import ctypes, resource, sys, os
try:
    ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
except Exception:
    pass
seconds, memory = int(sys.argv[1]), int(sys.argv[2])
for what, most in (("CPU", seconds), ("AS", memory), ("FSIZE", 1 << 20), ("CORE", 0), ("NOFILE", 64)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
here = os.path.realpath(os.getcwd()) + os.sep
source = sys.stdin.read()
code = compile(source, "program", "exec")
REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.link", "os.symlink", "shutil.", "ctypes.", "pty.",
    "syslog.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "http.client",
)
def guard(event, args):
    if event.startswith(REFUSED):
        raise PermissionError(event + " is refused")
    if event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        if not os.path.realpath(os.fsdecode(args[0])).startswith(here):
            raise PermissionError("writing outside the working directory is refused")
sys.addaudithook(guard)
exec(code, {"__name__": "__main__"})
"""


def failure(program: str, seconds: float) -> str:
    """Returns the last words of a program that failed, or "" for one that ran to its end."""
    command = [sys.executable, "-I", "-c", GUARD, str(math.ceil(seconds)), str(MEMORY)]
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run(
                command,
                input=program,
                capture_output=True,
                text=True,
                timeout=seconds,
                cwd=place,
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:g} s"
    if done.returncode == 0:
        return ""
    return done.stderr.strip()[-OUTPUT:] or f"ended with status {done.returncode}"


def passes(program: str, seconds: float) -> bool:
    """Tells if a program with its test runs to its end."""
    return not failure(program, seconds)


def pass_at(k: int, n: int, passed: int) -> float:
    """Returns the unbiased estimate of pass@k from `passed` of n samples.

    Chen et al. 2021, equation 1, https://arxiv.org/abs/2107.03374.
    """
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)
