"""Measures peak memory of a step over the model's own, in one process per variant.

python bench/memory.py [variant]
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import _measure as m
import torch

SIZE, VOCABULARY, ROWS, LENGTH = "h512", 32000, 4, 256
VARIANTS = ("veneer", "peft", "compiled", "full")


def resident() -> int:
    """Returns bytes of this process that lie in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * 4096


class Peak:
    """The largest resident set within the block, looked at every half millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self.stop = resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.bytes = max(self.bytes, resident())
            time.sleep(0.0005)

    def __exit__(self, *event: Any) -> None:
        self.stop.set()
        self.thread.join()


def step_of(variant: str, model: Any, batch: dict[str, torch.Tensor]) -> m.Step:
    """Returns a step of one variant on a loaded model."""
    import train_step

    if variant in ("veneer", "veneer_eager"):
        return train_step.ours(model, batch, compiled=variant == "veneer")
    if variant == "full":
        adam = m.optimiser(model, fused=False)
        return lambda: m.peer_step(model, adam, batch)
    return train_step.peer(model, batch, best=variant == "compiled")


def measure(variant: str) -> float:
    """Returns bytes over the loaded model."""
    import peft  # noqa: F401  (all variants have the same imports)

    torch.set_num_threads(1)
    torch.compile(lambda x: 2 * x)(torch.ones(5))
    model, batch = m.llama(SIZE, VOCABULARY, torch.bfloat16), m.random_batch(ROWS, LENGTH, VOCABULARY)
    before = resident()
    step = step_of(variant, model, batch)
    step(), step()
    with Peak() as peak:
        for _ in range(4):
            step()
    return peak.bytes - before


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    peaks = {}
    for variant in VARIANTS:
        for _ in range(2):  # what the first one compiles the second one finds cached
            done = subprocess.run(
                [sys.executable, __file__, variant], check=True, capture_output=True, text=True
            )
        peaks[variant] = float(json.loads(done.stdout.splitlines()[-1]))
        print(f"{variant}: {peaks[variant] / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    names = {"peak_vs_peft": "peft", "peak_vs_compiled": "compiled", "peak_vs_full_finetuning": "full"}
    m.report("memory", {figure: peaks["veneer"] / peaks[peer] for figure, peer in names.items()})


if __name__ == "__main__":
    main()
