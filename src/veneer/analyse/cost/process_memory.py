"""Memory as the system measures it: held by the process or the GPU, its peak, and available."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

STATUS, RESET, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def forget_peak(device: torch.device) -> int | None:
    """Resets the peak and returns the bytes held now; None if the system does not report them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        RESET.write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def peak(device: torch.device) -> int | None:
    """Returns the peak in bytes since `forget_peak`; None if the system does not report it."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def available(device: torch.device) -> int | None:
    """Returns the available bytes; None if the system does not report them."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free + int(torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    machine = _entry(MEMINFO, "MemAvailable")
    if machine is None and sys.platform != "win32" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [n for n in (machine, _of_group()) if n is not None]
    return min(found, default=None)


def _of_group() -> int | None:
    """Returns the bytes left in the container of the process; None without a container or a limit."""
    try:
        limit, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    cached = _statistic("inactive_file")
    return None if limit == "max" else max(0, int(limit) - int(used) + cached)


def _statistic(name: str) -> int:
    try:
        lines = (GROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def _status(name: str) -> int | None:
    return _entry(STATUS, name)


def _entry(file: Path, name: str) -> int | None:
    """Returns the bytes of a line "name: 12 kB" in one of Linux's files; None if the line is missing."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
