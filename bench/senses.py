"""Real models learn pictures and speech: python bench/senses.py [PART ..].

Parts: before_de, before_es, before_en, de, es, both, then vit_lora_0, mobilenet_full_2 and so on. Each takes
about a minute of processor time. Needs `make real`. Every part keeps its figures in the folder of the real
models, so that a run goes on where another ended; `--again` measures the named parts anew. The line has the
figures of all parts that are there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _measure as m
import _pictures as pictures
import _speech as speech
import torch

REAL = Path(os.environ.get("VENEER_REAL") or Path(__file__).parents[1] / ".real")
KEPT = REAL / "bench" / "senses"

PARTS: dict[str, Callable[[], dict[str, float]]] = {
    **{f"before_{language}": partial(speech.before, REAL, language) for language in speech.LENGTHS},
    "de": lambda: speech.learn(REAL, "de", KEPT),
    "es": lambda: speech.learn(REAL, "es", KEPT),
    "both": lambda: speech.together(REAL, KEPT),
    **{
        f"{kind}_{way}_{seed}": partial(pictures.compare, REAL, kind, way, seed)
        for seed in range(pictures.SEEDS)
        for kind in pictures.KINDS
        for way in ("linear_probe", "lora", "full")
    },
}


def main(words: list[str]) -> None:
    again = "--again" in words
    chosen = [w for w in words if not w.startswith("-")] or list(PARTS)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    KEPT.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        path = KEPT / f"{part}.json"
        if again or not path.is_file():
            began = time.monotonic()
            found = PARTS[part]()
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(part, json.dumps(found), f"{time.monotonic() - began:.0f} s", flush=True)
    paths = [p for p in (KEPT / f"{part}.json" for part in PARTS) if p.is_file()]
    figures = {k: v for p in paths for k, v in json.loads(p.read_text(encoding="utf-8")).items()}
    m.report("senses", pictures.averaged(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
