"""Shared settings of the tests."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch

# Compiled graphs of this checkout and this processor's instructions only, which PyTorch's key leaves out, and
# of one worker: another could open a library that is still being linked. Workers inherit the variable.
_OURS = Path(__file__).parents[1] / ".pytest_cache"
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
if os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(_OURS)).startswith(str(_OURS)):
    _GRAPHS = _OURS / f"inductor-{torch.backends.cpu.get_cpu_capability()}-{_WORKER}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_GRAPHS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts the tests in the background has them ignored, and so would every process they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Fixtures that several files use.
pytest_plugins = ["support.pretraining", "support.ranks", "support.real"]


FIRST = ("test_demo.py",)  # a test of half a minute must not begin when all others have ended
LEFT_OUT = {"slow": "takes minutes; run with -m slow", "ray": "starts Ray; run with -m ray"}


def pytest_collection_modifyitems(config, items):
    """Leaves tests of minutes out unless -m names them; begins with the longest of the others."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    for item in items:
        for mark, reason in LEFT_OUT.items():
            if item.get_closest_marker(mark) and mark not in config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collects without the garbage collector, and takes a million objects, which stay, off its list."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
