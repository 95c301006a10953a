"""The machine that a run meets: where it computes, in what precision, with what versions, and the memory it took."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from veneer.errors import ConfigError

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def device(name: str) -> torch.device:
    """The device of a name; "auto" is the current GPU where there is one, else the CPU. Raises ConfigError."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else found


def hardware(where: torch.device) -> str:
    """What computes: the GPU's name, or the processor's with the threads that PyTorch uses."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # other systems than Linux
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(where: torch.device) -> int:
    """Bytes: of the GPU since the process began, or of the whole process on the CPU; 0 where that is not known."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
