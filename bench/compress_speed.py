"""Speed of factored layers and of the decompositions, and the memory of compressing block by block.

python bench/compress_speed.py

Products of one layer d x d in bfloat16 with 1, 16 and 256 tokens against the dense layer, at keep 0.4 and 0.6
in both forms; the float64 singular value decomposition's time over that of the one eigendecomposition that
replaces it; peak memory of a process that compresses a model from its files, with 6 and with 24 blocks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _measure as m
import torch
from torch import Tensor, nn

from veneer.ops.matrix.whitening import decompose, regularised
from veneer.sites.factored.layers import holding, plain_linear, rank_within

D, TOKENS, KEEPS = 2048, (1, 16, 256), (0.4, 0.6)
BLOCKS, REPEATS = (6, 24), 9


def layers() -> dict[str, nn.Module]:
    """The dense layer, and factored ones by form and keep."""
    torch.manual_seed(0)
    W = 0.02 * torch.randn(D, D)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    found: dict[str, nn.Module] = {"dense": plain_linear(W.bfloat16())}
    for keep in KEEPS:
        for form in ("plain", "pivoted"):
            r = rank_within(D, D, keep * D * D, form) // 32 * 32
            A, B = S[:r, None].sqrt() * Vh[:r], U[:, :r] * S[:r].sqrt()
            found[f"{form}_keep{round(100 * keep)}"] = holding(form, A, B).bfloat16()
    return found


@torch.no_grad()
def run(layer: nn.Module, x: Tensor, times: int) -> None:
    for _ in range(times):
        layer(x)


def products(figures: dict[str, float]) -> None:
    every = layers()
    for n in TOKENS:
        x = torch.randn(n, D, dtype=torch.bfloat16)
        calls = {name: partial(run, layer, x, 1 + 512 // n) for name, layer in every.items()}
        seconds = m.interleaved(calls, repeats=REPEATS)
        for name in every:
            if name != "dense":
                figures[f"{name}_speedup_T{n}"] = seconds["dense"] / seconds[name]
    figures["forward_speedup_keep40_T256"] = figures["plain_keep40_speedup_T256"]
    figures["batch1_speedup"] = min(figures[f"plain_keep{k}_speedup_T1"] for k in (40, 60))
    figures["batch16_speedup"] = min(figures[f"plain_keep{k}_speedup_T16"] for k in (40, 60))


def seconds(call: Callable[[], Any]) -> float:
    """Returns the processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def plain_svd(W: Tensor) -> Any:
    return torch.linalg.svd(W.double(), full_matrices=False)


def whitened_svd(W: Tensor, C: Tensor) -> Tensor:
    """Does what `decompose` does by the published route: whiten, decompose, take the whitening back."""
    L = torch.linalg.cholesky(C)
    found: Tensor = torch.linalg.solve_triangular(L.mT, plain_svd(W @ L)[2].mT, upper=True)
    return found


def decompositions(figures: dict[str, float]) -> None:
    import scipy.linalg  # noqa: F401  outside of the measured time

    for out, in_ in ((1024, 4096), (4096, 4096)):
        draw = torch.Generator().manual_seed(0)
        W = torch.randn(out, in_, generator=draw)
        X = torch.randn(2 * in_, in_, generator=draw)
        C = regularised(X.mT @ X / len(X), 1e-6)
        ours = seconds(partial(decompose, W, C))
        figures[f"svd_ratio_{out}x{in_}"] = seconds(partial(plain_svd, W)) / ours
        figures[f"whitened_svd_ratio_{out}x{in_}"] = seconds(partial(whitened_svd, W.double(), C)) / ours


CHILD = """
import resource, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from typing import Any
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.recipe import recipe
from veneer.compress.lowrank.work import Work
from veneer.models.streamed import Streamed
folder = Path(sys.argv[1])
ids = torch.randint(0, 512, (4, 128), generator=torch.Generator().manual_seed(0))
batches = [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]
source = Streamed(folder, "all-linear", ())
Job(source, batches, recipe("auto", 0.8, refine=1), Work(folder / "work", {}), torch.bfloat16).run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def memory(figures: dict[str, float]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    peaks = {}
    for n in BLOCKS:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            sizes = dict(
                hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8
            )
            config = LlamaConfig(vocab_size=512, num_hidden_layers=n, **sizes)
            LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
            child = [sys.executable, "-c", CHILD, folder]
            done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True)
            peaks[n] = int(done.stdout.split()[-1])
    figures["peak_24_over_6"] = peaks[24] / peaks[6]
    figures["peak_6_mib"] = peaks[6] / 2**20


def main() -> None:
    figures: dict[str, float] = {}
    torch.set_num_threads(1)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # SciPy's; before its import
    kept = Path(tempfile.gettempdir()) / "veneer-compress-speed.json"
    for part in (products, decompositions, memory):
        held = json.loads(kept.read_text()) if kept.is_file() else {}
        if part.__name__ not in held:
            own: dict[str, float] = {}
            part(own)
            held[part.__name__] = own
            kept.write_text(json.dumps(held))
        figures |= held[part.__name__]
    kept.unlink()
    m.report("compress_speed", figures)


if __name__ == "__main__":
    main()
