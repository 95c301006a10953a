"""Compression of the built-in code model by every method: excess bits per byte, and how much of its code
still parses.

python bench/compress.py [--draw N] [--report]

Calibrated on 32 windows of 256 tokens of the standard library's source, three draws of modules and windows;
measured on modules that neither the model nor the calibration has seen, and on English prose. Excess is over
the dense model's bits per byte. Prose, samples of code, and `auto plain`, which is auto without pivoted
storage, are measured at the first draw only. Every measurement stays in runs/bench-compress and is not made
again, so that an interrupted bench goes on. --draw makes those of one draw alone: three can run side by side.
--report makes none: it reports, at every ratio, the draws that are complete (`draws_keep..`).
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _measure as m
import torch

from veneer import tasks
from veneer.compress.compress import put_blocks
from veneer.compress.lowrank import plan
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

KEEPS, DRAWS, WINDOWS, LENGTH, TESTED = (0.9, 0.8, 0.6, 0.4), 3, 32, 256, 40
METHODS = ("svd", "lord", "svd-llm", "fisher", "allocate", "refine", "auto", "auto plain")
SINGLE = ("svd", "lord", "svd-llm", "fisher", "allocate", "refine")
FAR, ONCE = 1.05, ("svd", "auto plain")
PARSED = ("lord", "auto")  # of which samples are drawn, at the first draw
SAMPLES, TOKENS = 100, 96
CUT_40 = round(256 * (1 - 0.3958))  # the rank at LoRD's cut of 39.58 %
KEPT = Path("runs") / "bench-compress"


def windows(tokenizer: Any, documents: list[texts.Document], length: int = LENGTH) -> list[Window]:
    rows = [Row("text", {"text": d.text}, d.title) for d in documents]
    reading = Reading(length=length, packing=False)
    return read.prepare(rows, tasks.build("causal-lm", tokenizer, reading), Notes()).examples


@functools.cache
def calibration(draw: int) -> list[Any]:
    """Batches of whole windows of 80 modules of the library, drawn by the number."""
    tokenizer = pretrained.tokenizer("builtin")
    documents, source = texts.library(tests=False), keyed(draw, "modules")
    chosen = [documents[i] for i in torch.randperm(len(documents), generator=source)[:80].tolist()]
    whole = [w for w in windows(tokenizer, chosen) if len(w[0].inputs) == LENGTH]
    some = [whole[i] for i in torch.randperm(len(whole), generator=source)[:WINDOWS].tolist()]
    return batches(some, 4, torch.device("cpu"))


def dense() -> Any:
    return pretrained.causal_lm("builtin", torch.float32, torch.device("cpu"))


def compressed(method: str, keep: float, draw: int) -> tuple[Any, float]:
    """The model by one method at one ratio, from one draw, and the seconds; surveys are shared by ratios."""
    name, _, storage = method.partition(" ")
    chosen = recipe(name, keep, **({"storage": storage} if storage else {}))
    source = Held(dense(), "all-linear", ())
    folder = KEPT / "work" / f"{name}-{storage}-{keep}-{draw}"
    shared = Work(KEPT / "work" / f"survey-{chosen.centre}-{draw}", {})
    work, data = Work(folder, chosen.as_dict()), calibration(draw)
    start = time.process_time()
    Job(source, data, chosen, work, torch.float32, draw, surveys=shared).run()
    seconds = time.process_time() - start
    put_blocks(source, work)
    shutil.rmtree(folder)
    return source.model.eval(), seconds


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


def cell(tests: dict[str, list[Window]], method: str, keep: float, draw: int) -> dict[str, float]:
    model, seconds = compressed(method, keep, draw)
    found = {**measured(model, tests if draw == 0 else {"known": tests["known"]}), "seconds": seconds}
    if method in PARSED and draw == 0:
        found["parse"] = parse_share(model, pretrained.tokenizer("builtin"))
    print(method, keep, draw, found, flush=True)
    return found


Cells = dict[tuple[str, float, int], dict[str, float]]


def cells(tests: dict[str, list[Window]], draws: Sequence[int], *, make: bool = True) -> Cells:
    """The measurements of these draws, those that are missing made if `make`.

    At the first draw alone: svd, which sees no texts, auto plain, and refine where it lost more than FAR
    times as much as allocate.
    """
    found: Cells = {}
    for draw, keep, method in itertools.product(draws, KEEPS, METHODS):
        if draw == 0 or (method not in ONCE and not (method == "refine" and is_far(keep))):
            name = f"{method}-{keep}-{draw}"
            if make or (KEPT / f"{name}.json").is_file():
                found[method, keep, draw] = kept(name, functools.partial(cell, tests, method, keep, draw))
    return found


def complete(made: Cells, keep: float) -> list[int]:
    """The draws in which every method was measured that is measured in all draws."""
    wanted = [m for m in METHODS if m not in ONCE and not (m == "refine" and is_far(keep))]
    return [d for d in range(DRAWS) if all((m, keep, d) in made for m in wanted)]


def is_far(keep: float) -> bool:
    """True where refine lost more than FAR times as much as allocate at the first draw."""
    base, paths = kept("dense", dict)["known"], [KEPT / f"{m}-{keep}-0.json" for m in ("refine", "allocate")]
    if not all(p.is_file() for p in paths):
        return False
    refined, allocated = (json.loads(p.read_text(encoding="utf-8"))["known"] - base for p in paths)
    return bool(refined > FAR * allocated)


def builtin(figures: dict[str, float], tests: dict[str, list[Window]], *, make: bool) -> None:
    base = kept("dense", dict)
    figures |= {
        "dense_known_bpb": base["known"],
        "dense_prose_bpb": base["prose"],
        "dense_parse": base["parse"],
    }
    made = cells(tests, range(DRAWS), make=make)
    for keep in KEEPS:
        at = f"keep{round(100 * keep)}"
        excess: dict[str, list[float]] = {}
        draws = complete(made, keep)
        figures[f"draws_{at}"] = float(len(draws))
        for method in METHODS:
            rows = [made[method, keep, d] for d in draws if (method, keep, d) in made]
            name = re.sub(r"\W", "_", method)
            excess[method] = [r["known"] - base["known"] for r in rows]
            figures[f"{name}_excess_{at}"] = statistics.mean(excess[method])
            if len(rows) > 1:
                figures[f"{name}_excess_{at}_sd"] = statistics.stdev(excess[method])
            figures[f"{name}_excess_{at}_prose"] = rows[0]["prose"] - base["prose"]
            if method in PARSED:
                figures[f"{name}_parse_{at}"] = rows[0]["parse"]
        mean = {method: statistics.mean(some) for method, some in excess.items()}
        figures[f"auto_over_best_single_{at}"] = mean["auto"] / min(mean[s] for s in SINGLE)
        first = min(excess[s][0] for s in SINGLE)
        figures[f"auto_plain_over_best_single_{at}"] = excess["auto plain"][0] / first
        figures[f"lord_over_svd_{at}"] = mean["lord"] / mean["svd"]


class Cut(Job):
    """LoRD of one rank everywhere, above break-even too."""

    rank = 0

    def _ranks(self, sizes: Any) -> dict[str, plan.Cut]:
        return {n: plan.Cut(self.rank) for n in sizes}


def lord(rank: int) -> Any:
    """The model with MLPs of this rank by LoRD."""
    source = Held(dense(), ["gate_proj", "up_proj", "down_proj"], ())
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), {})
        job = Cut(source, calibration(0), recipe("lord", 0.9), work, torch.float32)
        job.rank = rank
        job.run()
        put_blocks(source, work)
    return source.model.eval()


def lord_cut(figures: dict[str, float], tests: dict[str, list[Window]]) -> None:
    """LoRD's own figures: the MLPs' rank cut at which perplexity rises by 1 %, and the speed there."""
    test, base = tests["known"], kept("dense", dict)["known"]
    per_token = n_bytes(test) / sum(len(s.labels) for w in test for s in w)

    def rise(rank: int) -> dict[str, float]:
        bits = bits_per_byte(lord(rank), test, next_token.loss, batch=8)
        return {"rise": 2 ** ((bits - base) * per_token) - 1}

    low, high = 0, 256  # ranks with more and with less than 1 %
    while high - low > 16:
        rank = (low + high) // 2
        if kept(f"lord-rank-{rank}", functools.partial(rise, rank))["rise"] > 0.01:
            low = rank
        else:
            high = rank
    a, b = (kept(f"lord-rank-{rank}", dict)["rise"] for rank in (low, high))
    rank = low + (high - low) * (a - 0.01) / (a - b)  # between the two
    figures["lord_rank_cut_at_1_percent"] = 1 - rank / 256
    figures["lord_parameters_at_1_percent"] = rank * (256 + 704) / (256 * 704)
    figures |= kept(
        "lord-cut-40", lambda: {"lord_rise_at_cut_40": rise(CUT_40)["rise"], **speeds(round(rank))}
    )


def speeds(rank: int) -> dict[str, float]:
    """Returns the speed on 1,024 tokens over the dense model's, with LoRD of this rank and of CUT_40."""
    ids = torch.randint(0, 4096, (4, 256), generator=torch.Generator().manual_seed(0))
    models = {"dense": dense(), "at_1_percent": lord(rank), "at_cut_40": lord(CUT_40)}
    with torch.no_grad():
        seconds = m.interleaved({n: functools.partial(model, ids) for n, model in models.items()}, repeats=5)
    return {f"lord_speedup_{n}": seconds["dense"] / s for n, s in seconds.items() if n != "dense"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--draw", type=int, choices=range(DRAWS), help="make only the measurements of this draw"
    )
    parser.add_argument("--report", action="store_true", help="make no measurement of the methods")
    given = parser.parse_args()
    figures: dict[str, float] = {}
    torch.set_num_threads(1)
    tokenizer = pretrained.tokenizer("builtin")
    tests = {
        "known": spread(windows(tokenizer, texts.known("test")), TESTED),
        "prose": spread(windows(tokenizer, texts.domain("prose", "test")), TESTED),
    }
    kept("dense", lambda: {**measured(dense(), tests), "parse": parse_share(dense(), tokenizer)})
    if given.draw is not None:
        cells(tests, [given.draw])
        return
    builtin(figures, tests, make=not given.report)
    lord_cut(figures, tests)
    m.report("compress", figures)


if __name__ == "__main__":
    main()
