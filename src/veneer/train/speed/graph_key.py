"""Keys the cache of compiled graphs by the processor, which PyTorch's own key leaves out.

A graph that is compiled for one instruction set gives wrong numbers at another: products with weights packed
for AVX-512 differ by more than their size under AVX2. Machines that share a home directory share the cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from veneer.version import __version__

# Variables that limit the instructions of PyTorch and of oneDNN.
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")


def tag() -> str:
    """Returns the key: the capability in use, and a hash of features, limits and versions."""
    found = {
        "features": _features(),
        "limits": {name: os.environ.get(name) for name in LIMITS},
        "machine": platform.machine(),
        "versions": [__version__, torch.__version__],
    }
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()
    return f"veneer-{torch.backends.cpu.get_cpu_capability()}-{digest[:16]}"


def use() -> None:
    """Adds the key to those of all graphs that this process compiles or looks up from now on.

    It holds for the process, not for a block: backward graphs are compiled after the forward has returned.
    """
    own = tag()
    try:
        from torch.compiler import config

        others = [part for part in config.cache_key_tag.split() if not part.startswith("veneer-")]
        config.cache_key_tag = " ".join([*others, own])
    except (ImportError, AttributeError):  # an older PyTorch: a folder for each key
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / own))


def _features() -> list[tuple[str, Any]]:
    """Returns what the processor can do, without what changes from one start to the next."""
    known = getattr(torch.cpu, "get_capabilities", None)
    if known is not None:
        return sorted((k, v) for k, v in known().items() if isinstance(v, bool) or k == "architecture")
    asked = [n for n in dir(torch.cpu) if n.startswith("_is_") and n.endswith("_supported")]
    return [(name, bool(getattr(torch.cpu, name)())) for name in sorted(asked)]
