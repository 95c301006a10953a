"""Describes the machine of a run: device, hardware, versions of packages, and memory taken."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from veneer import dtypes
from veneer.errors import ConfigError
from veneer.ops.matrix.linalg import multiplies_bf16

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def device(name: str) -> torch.device:
    """Returns the device of a name; "auto" is the current GPU, or the CPU without one. Raises ConfigError."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"device {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else found


def dtype(name: str, where: torch.device) -> torch.dtype:
    """Returns the dtype of a name; "auto" is bfloat16 where the device multiplies it. Raises ConfigError."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(where) else torch.float32
    return dtypes.of_name(name, ("auto",))


def hardware(where: torch.device) -> str:
    """Returns the name of the GPU, or of the processor with the threads that PyTorch uses."""
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
    """Returns the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory(where: torch.device) -> int:
    """Returns the peak in bytes of the GPU, or of the whole process on the CPU; 0 if unknown."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
