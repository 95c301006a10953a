"""Compression of the built-in code model by every method: excess bits per byte, and how much of its code
still parses.

python bench/compress.py [--real FOLDER]

Calibrated on 64 windows of 256 tokens of the standard library's source, three draws of modules and windows;
measured on modules that neither the model nor the calibration has seen, and on English prose. Excess is over
the dense model's bits per byte. Each measurement stays in runs/bench-compress once it was made, and
not made again. --real: a folder with SmolLM2-135M (make real KEYS=smollm2): calibrated and tested on English
text of the interpreter.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import _measure as m
import torch

from veneer import tasks
from veneer.compress.compress import put_blocks
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.recipe import recipe
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.work import Work
from veneer.data.pack import Window, n_bytes
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.embedded import texts
from veneer.models import pretrained
from veneer.ops.draws import keyed
from veneer.runs.texts import texts as read
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import bits_per_byte
from veneer.train.loop.progress import Notes
from veneer.verbs.compress.calibration import batches

KEEPS, DRAWS, WINDOWS, LENGTH, TESTED = (0.9, 0.8, 0.6, 0.4), 3, 64, 256, 40
METHODS = ("svd", "lord", "svd-llm", "fisher", "allocate", "refine", "auto", "auto plain")
SINGLE = ("svd", "lord", "svd-llm", "fisher", "allocate", "refine")
PARSED = ("svd-llm", "auto")  # of which samples are drawn, at the first draw
SAMPLES, TOKENS = 100, 96
KEPT = Path("runs") / "bench-compress"


def windows(tokenizer: Any, documents: list[texts.Document]) -> list[Window]:
    rows = [Row("text", {"text": d.text}, d.title) for d in documents]
    reading = Reading(length=LENGTH, packing=False)
    return read.prepare(rows, tasks.build("causal-lm", tokenizer, reading), Notes()).examples


def calibration(tokenizer: Any, draw: int) -> list[Window]:
    """Whole windows of 80 modules of the library, drawn by the number."""
    documents, source = texts.library(tests=False), keyed(draw, "modules")
    chosen = [documents[i] for i in torch.randperm(len(documents), generator=source)[:80].tolist()]
    whole = [w for w in windows(tokenizer, chosen) if len(w[0].inputs) == LENGTH]
    return [whole[i] for i in torch.randperm(len(whole), generator=source)[:WINDOWS].tolist()]


def compressed(tokenizer: Any, method: str, keep: float, draw: int) -> Any:
    """The model by one method at one ratio, from one draw; surveys are shared by ratios."""
    model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
    name, _, storage = method.partition(" ")
    chosen = recipe(name, keep, **({"storage": storage} if storage else {}))
    folder = KEPT / "work" / f"{name}-{storage}-{keep}-{draw}"
    shared = Work(KEPT / "work" / f"survey-{chosen.centre}-{draw}", {})
    device = torch.device("cpu")
    data = batches(calibration(tokenizer, draw), 4, device)
    work = Work(folder, chosen.as_dict())
    job = Job(Held(model, "all-linear", ()), data, chosen, work, torch.float32, draw, surveys=shared)
    start = time.process_time()
    job.run()
    seconds = time.process_time() - start
    put_blocks(job.source, work)
    shutil.rmtree(folder)
    return model.eval(), seconds


def measured(model: Any, tests: dict[str, list[Window]]) -> dict[str, float]:
    return {name: bits_per_byte(model, some, next_token.loss, batch=8) for name, some in tests.items()}


def parse_share(model: Any, tokenizer: Any) -> float:
    """Share of samples that are Python up to the start of their last statement at the left margin."""
    torch.manual_seed(0)
    start = torch.full((SAMPLES, 1), tokenizer.bos_token_id)
    options = dict(do_sample=True, temperature=0.7, top_p=0.95, max_new_tokens=TOKENS)
    with torch.no_grad():
        out = model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=1, **options)
    return statistics.mean(parses(tokenizer.decode(row[1:], skip_special_tokens=True)) for row in out)


def parses(text: str) -> bool:
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line[:1] not in ("", " ", "\t", ")", "]", "}", "#")]
    whole = "\n".join(lines[: starts[-1]]) if len(starts) > 1 else ""
    if not whole.strip():
        return False
    try:
        ast.parse(whole)
    except (SyntaxError, ValueError):
        return False
    return True


def kept(name: str, make: Any) -> dict[str, float]:
    """A measurement from its file, or made and kept."""
    path = KEPT / f"{name}.json"
    if path.is_file():
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return found
    made: dict[str, float] = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made), encoding="utf-8")
    return made


def cell(
    tokenizer: Any, tests: dict[str, list[Window]], method: str, keep: float, draw: int
) -> dict[str, float]:
    model, seconds = compressed(tokenizer, method, keep, draw)
    found = {**measured(model, tests), "seconds": seconds}
    if method in PARSED and draw == 0:
        found["parse"] = parse_share(model, tokenizer)
    print(method, keep, draw, found, flush=True)
    return found


def builtin(figures: dict[str, float]) -> None:
    tokenizer = pretrained.tokenizer("builtin")
    tests = {
        "known": spread(windows(tokenizer, texts.known("test")), TESTED),
        "prose": spread(windows(tokenizer, texts.domain("prose", "test")), TESTED),
    }
    dense = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
    base = kept("dense", lambda: {**measured(dense, tests), "parse": parse_share(dense, tokenizer)})
    figures |= {
        "dense_known_bpb": base["known"],
        "dense_prose_bpb": base["prose"],
        "dense_parse": base["parse"],
    }
    for keep in KEEPS:
        excess: dict[str, float] = {}
        for method in METHODS:
            rows = [
                kept(
                    f"{method}-{keep}-{draw}",
                    lambda d=draw, me=method, k=keep: cell(tokenizer, tests, me, k, d),
                )
                for draw in range(DRAWS)
            ]
            named = f"{method.replace('-', '_').replace(' ', '_')}_excess_keep{round(100 * keep)}"
            excess[method] = statistics.mean(r["known"] - base["known"] for r in rows)
            figures[named] = excess[method]
            figures[f"{named}_sd"] = statistics.stdev(r["known"] for r in rows)
            figures[f"{named}_prose"] = statistics.mean(r["prose"] - base["prose"] for r in rows)
            if "parse" in rows[0]:
                figures[f"{method.replace('-', '_')}_parse_keep{round(100 * keep)}"] = rows[0]["parse"]
        best = min(excess[s] for s in SINGLE)
        figures[f"auto_over_best_single_keep{round(100 * keep)}"] = excess["auto"] / best
        figures[f"auto_plain_over_best_single_keep{round(100 * keep)}"] = excess["auto plain"] / best
        figures[f"lord_over_svd_keep{round(100 * keep)}"] = excess["lord"] / excess["svd"]


def lord_cut(figures: dict[str, float]) -> None:
    """LoRD's own figures: the MLPs' rank cut at which perplexity rises by 1 %, and the speed there."""
    tokenizer = pretrained.tokenizer("builtin")
    test = spread(windows(tokenizer, texts.known("test")), TESTED)
    base = kept("dense", dict)["known"]
    per_token = n_bytes(test) / sum(len(s.labels) for w in test for s in w)

    def at(cut: float) -> dict[str, float]:
        model = pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))
        rank = round(256 * (1 - cut))
        keep = rank * (256 + 704) / (256 * 704) + 1e-9
        import veneer

        data = batches(calibration(tokenizer, 0), 4, torch.device("cpu"))
        to = ["gate_proj", "up_proj", "down_proj"]
        veneer.compress(model, "lord", keep=min(keep, 1.0), data=data, to=to)
        bits = bits_per_byte(model, test, next_token.loss, batch=8)
        return {"rise": 2 ** ((bits - base) * per_token) - 1}

    before = (0.0, 0.0)
    for cut in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65):
        rise = kept(f"lord-cut-{cut}", lambda c=cut: at(c))["rise"]
        if rise > 0.01:
            figures["lord_rank_cut_at_1_percent"] = before[0] + (cut - before[0]) * (0.01 - before[1]) / (
                rise - before[1]
            )
            return
        before = (cut, rise)
    figures["lord_rank_cut_at_1_percent"] = before[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    figures: dict[str, float] = {}
    torch.set_num_threads(1)
    builtin(figures)
    lord_cut(figures)
    m.report("compress", figures)


if __name__ == "__main__":
    main()
