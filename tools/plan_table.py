"""Writes the table of docs/scale.md: forecast memory and exchanged bytes of large bases on many GPUs.

    python tools/plan_table.py docs/scale.md

Each base is a Llama's configuration; no weight is loaded. It takes a minute of one processor.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer.train.run import Run
from veneer.verbs.plan.processes import Simulated, simulated

BEGIN, END = "<!-- plan_table -->\n", "<!-- end of plan_table -->\n"
SIZES = (8, 64, 1024)
BASES: dict[str, dict[str, int]] = {
    "7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "405B": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}
KEYS = {"7B": 32, "70B": 8, "405B": 8}  # key-value heads
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "dora": {"rank": 16},
    "loraxs": {"rank": 64},
    "full": {},
}


def steps() -> Iterator[tuple[str, str, Simulated]]:
    """Yields base, method and the step of one process: 2,048 tokens, recomputed blocks, bf16."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        for base, sizes in BASES.items():
            path = f"{folder}/{base}"
            words = 32000 if base == "7B" else 128256
            config = LlamaConfig(**sizes, num_key_value_heads=KEYS[base], vocab_size=words)
            config.save_pretrained(path)
            for method, options in METHODS.items():
                own: dict[str, Any] = dict(method=method, options=options, length=2048, device="cpu", lr=1e-4)
                run = Run(data=("-",), model=path, precision="bf16", gradient_checkpointing=True, **own)
                yield base, method, simulated(run, 1)


def rows() -> Iterator[str]:
    """Yields the lines of the table."""
    yield "| base, method | GPUs | whole: memory | whole: sent | divided: memory | divided: sent |"
    yield "|---|---|---|---|---|---|"
    for base, method, step in steps():
        for size in SIZES:
            cells = []
            for shard in (False, True):
                if shard and method == "full":
                    cells += ["", ""]
                    continue
                found = step.among(size, shard=shard)
                cells += [f"{found.memory.peak / 1e9:,.1f} GB", f"{found.wire.sent / 1e9:,.2f} GB"]
            yield f"| {base}, {method} | {size:,} | {' | '.join(cells)} |"


def main(page: Path) -> None:
    """Replaces the table between the page's marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "".join(f"{line}\n" for line in rows())
    page.write_text(f"{before}{BEGIN}\n{lines}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
