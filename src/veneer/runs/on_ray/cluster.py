"""Joins a cluster of Ray, or makes one of this machine alone."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from veneer.errors import ConfigError, option
from veneer.train.run import Run

# Ray replaces 127.0.0.1 by the address of a network, where others could reach a cluster without a password.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
STORE = 1 << 27  # bytes of Ray's object store: the workers exchange nothing through it
# Ray's settings, unless given: no usage statistics, no copies of printed lines, and an end that is soon seen.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def module() -> Any:
    """Returns the module `ray`, with its settings made. Raises ConfigError if Ray Train is not installed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.train.torch
    except ImportError as e:
        raise ConfigError(f"{option('engine', 'ray')} needs Ray Train: pip install 'veneer[ray]'") from e
    return ray


@contextmanager
def joined(ray: Any) -> Iterator[None]:
    """Joins the cluster of RAY_ADDRESS within the block, or makes one; leaves one that is joined already."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local = {"address": "local", "include_dashboard": False, "object_store_memory": STORE}
    before = signal.getsignal(signal.SIGTERM)
    try:
        more = {} if address else {**local, "_node_ip_address": LOOPBACK}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **more)
    except ConnectionError as e:
        first = str(e).splitlines()[0]
        raise ConfigError(f"RAY_ADDRESS {address!r} does not answer ({first}); start the cluster") from e
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own handler would end this process without a message
    try:
        yield
    finally:
        ray.shutdown()


def places(ray: Any, run: Run, workers: int | None) -> tuple[int, bool]:
    """Returns the number of workers, and True if each has a GPU.

    Raises ConfigError for a device that workers cannot share, and for more workers than devices.
    """
    device = option("device")
    if run.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{device} must be auto, cpu or cuda for workers of Ray, got {run.device}")
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    if run.device == "cuda" and not gpus:
        raise ConfigError(f"{device} must be auto or cpu on a cluster without GPUs, got cuda")
    on_gpu = gpus > 0 and run.device != "cpu"
    most, kind = (gpus, "GPUs") if on_gpu else (cpus, "CPUs")
    n = workers if workers is not None else most if on_gpu else 1
    if not 1 <= n <= most:
        raise ConfigError(f"{option('workers')} must be 1 to {most}, the {kind} of the cluster, got {n}")
    return n, on_gpu
