"""Adapters on real pretrained weights: function calls, rated film sentences, speed and memory.

python bench/real.py [part ..]

SmolLM2-135M-Instruct (weights dequantised from Q4_1) learns BFCL's questions with one function call, and is
right if its greedy answer equals the true call as JSON. MiniLM learns to tell good from bad in VADER's rated
film sentences. Both by LoRA and by full fine-tuning. `make real` fetches models and data. A part that is
finished is not repeated, one that was stopped goes on; without names all parts run. Files lie in
$VENEER_REAL/bench. The last line has all figures so far.

parts: floors, rates-films-lora, rates-films-full, films-lora-0, .., films-full-2, calls-lora-0, ..,
calls-full-2, speed, memory. `rates` parts choose a method's learning rate from its own grid, on the rows for
validation, with a seed of their own.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import _measure as m
import _real_data as data
import torch

PLACE = data.ROOT / "bench"
STATE = PLACE / "parts.json"
SEEDS = (0, 1, 2)
CALLS = dict(steps=120, batch=1, length=512, eval_every=120, save_every=10, compile="on", warmup=0.05)
FILMS = dict(steps=300, batch=16, length=64, eval_every=100, save_every=50, compile="off", warmup=0.05)
RATES = {"calls": {"lora": 1e-3, "full": 2e-5}, "films": {"lora": 2e-3, "full": 1e-4}}
GRIDS = {"lora": (5e-4, 1e-3, 2e-3), "full": (5e-5, 1e-4, 2e-4)}
RANK = 8
ROWS, TOKENS = 16, 512  # rows of an epoch for speed; tokens of a batch
VARIANTS = ("veneer", "peft", "compiled")


def settings(kind: str, method: str, seed: int) -> dict[str, Any]:
    """Returns a training of `kind` (calls or films) by one method."""
    folder = PLACE / kind
    if not (folder / "train.jsonl").exists():
        {"calls": data.calls, "films": data.films}[kind](folder)
    own: dict[str, Any] = {"task": "answers", "task_options": {"match": "json"}, "model": "smollm2", **CALLS}
    if kind == "films":
        own = {"task": "sequence-classification", "model": "minilm", **FILMS}
    return {
        **own,
        "model": str(data.ROOT / own["model"]),
        "data": str(folder / "train.jsonl"),
        **{part: str(folder / f"{part}.jsonl") for part in ("valid", "test")},
        "known": "none",
        "method": method,
        "options": {"rank": RANK} if method == "lora" else {},
        "lr": chosen(kind, method),
        "eval_windows": 0,
        "seed": seed,
        "device": "cpu",
        "report": False,
        "resume": True,
        "out": str(PLACE / f"{kind}-{method}-{seed}"),
    }


def finished() -> dict[str, dict[str, float]]:
    """Returns the measurements so far."""
    found: dict[str, dict[str, float]] = json.loads(STATE.read_text("utf-8")) if STATE.exists() else {}
    return found


def chosen(kind: str, method: str) -> float:
    """Returns the learning rate that was best on validation rows, or the first guess before that."""
    grid = finished().get(f"rates-{kind}-{method}")
    return float(max(grid, key=lambda rate: grid[rate])) if grid else RATES[kind][method]


def rates(kind: str, method: str) -> dict[str, float]:
    """Trains at every rate of the method's grid and returns its figure on the rows for validation."""
    from veneer.runs.fit import fit
    from veneer.train.run import Run

    found = {}
    for rate in GRIDS[method]:
        given = settings(kind, method, len(SEEDS))
        given |= {"lr": rate, "test": given["valid"], "out": f"{given['out']}-{rate:g}"}
        found[f"{rate:g}"] = fit(Run.from_dict(given)).learned.after
    return found


def learned(kind: str, method: str, seed: int) -> dict[str, float]:
    """Trains and returns the figure on test text before and after, and the share of trained parameters."""
    from veneer.runs.fit import fit
    from veneer.train.run import Run

    found = fit(Run.from_dict(settings(kind, method, seed)))
    trained = found.metrics["trainable_parameters"]
    return {"before": found.learned.before, "after": found.learned.after, "trained": trained}


def floors() -> dict[str, float]:
    """Returns the accuracy of the most frequent class, and of words counted by TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    settings("films", "lora", 0)
    parts = {
        part: [
            json.loads(line) for line in (PLACE / "films" / f"{part}.jsonl").read_text("utf-8").splitlines()
        ]
        for part in ("train", "test")
    }
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    counts = words.fit_transform([row["text"] for row in parts["train"]])
    model = LogisticRegression(C=4, max_iter=500).fit(counts, [row["label"] for row in parts["train"]])
    truths = [row["label"] for row in parts["test"]]
    found = model.score(words.transform([row["text"] for row in parts["test"]]), truths)
    return {"majority": max(truths.count(t) for t in {*truths}) / len(truths), "tfidf": float(found)}


def texts() -> Any:
    """Returns the task and the tokenised rows of an epoch, one segment each."""
    from transformers import AutoTokenizer

    from veneer.data.reading import Reading
    from veneer.data.row_files import read_file
    from veneer.tasks import build

    settings("calls", "lora", 0)
    task = build("answers", AutoTokenizer.from_pretrained(data.ROOT / "smollm2"), Reading(length=TOKENS))
    rows = read_file(PLACE / "calls" / "train.jsonl")[:ROWS]
    return task, [s for row in rows for s in task.pieces(task.encode(row), TOKENS)]


def padded(segments: Any, multiple: int) -> list[dict[str, torch.Tensor]]:
    """Returns batches of four rows of like length as transformers takes them."""
    ordered, made = sorted(segments, key=lambda s: len(s.inputs)), []
    for at in range(0, len(ordered), 4):
        some = ordered[at : at + 4]
        t = -(-max(len(s.inputs) for s in some) // multiple) * multiple
        batch = {"input_ids": torch.zeros(4, t, dtype=torch.long), "labels": torch.full((4, t), -100)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for i, s in enumerate(some):
            n = len(s.inputs)
            batch["input_ids"][i, :n], batch["attention_mask"][i, :n] = s.inputs, 1
            batch["labels"][i, 1:n] = s.labels[:-1]
        made.append(batch)
    return made


def epoch(variant: str) -> m.Step:
    """Returns an epoch of one variant over the same rows."""
    from transformers import AutoModelForCausalLM

    from veneer.data import pack
    from veneer.train.speed.compiling import prepare, widths

    task, segments = texts()
    model = AutoModelForCausalLM.from_pretrained(data.ROOT / "smollm2", dtype=torch.bfloat16).train()
    if variant != "veneer":
        best = variant == "compiled"
        model = m.peft_model(model, best=best)
        adam, every = m.optimiser(model, fused=best), padded(segments, 64 if best else 1)
        return lambda: [m.peer_step(model, adam, batch) for batch in every]
    windows, model = pack.pack(segments, TOKENS), m.veneer_model(model)
    batches = [task.collate([w], widths(TOKENS, True)) for w in windows]
    objective = prepare(model, task, batches[0], compiled=True)
    adam = m.optimiser(model, fused=True)
    return lambda: [m.our_step(model, objective, adam, batch) for batch in batches]


def speed() -> dict[str, float]:
    """Returns useful tokens a second of each variant, taken in turns."""
    torch._dynamo.config.recompile_limit = 64
    n = sum(len(s.inputs) for s in texts()[1])
    seconds = m.interleaved({v: epoch(v) for v in VARIANTS}, repeats=3, warm=2)
    return {variant: n / t for variant, t in seconds.items()}


def peak(variant: str) -> float:
    """Returns the bytes of an epoch over imports and weights, at their most.

    Weights are counted and not read from the process: what compiling leaves behind belongs to the epoch.
    """
    import memory
    from safetensors import safe_open

    torch.set_num_threads(1)
    with safe_open(data.ROOT / "smollm2" / "model.safetensors", framework="pt") as f:
        weights = 2 * sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())
    before = memory.resident()
    step = epoch(variant)
    step()
    with memory.Peak() as found:
        step()
    print(f"{variant}: {before} before, {weights} weights, {found.bytes} peak", file=sys.stderr)
    return float(found.bytes - before - weights)


def peaks() -> dict[str, float]:
    """Returns the peak of each variant, in a process of its own."""
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, f"peak-{variant}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[variant] = float(done.stdout.splitlines()[-1])
    return found


def part(name: str) -> dict[str, float]:
    """Returns the measurements of one part."""
    if name == "speed":
        return speed()
    if name == "memory":
        return peaks()
    if name == "floors":
        return floors()
    kind, method, seed = name.split("-")
    if kind == "rates":
        return rates(method, seed)
    return learned(kind, method, int(seed))


def figures(done: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the figures of all finished parts."""
    found: dict[str, float] = {}
    for kind, title, exact in (("calls", "smollm2", "exact_"), ("films", "minilm", "")):
        ways = {w: [done[k] for s in SEEDS if (k := f"{kind}-{w}-{s}") in done] for w in ("lora", "full")}
        for way, runs in ways.items():
            if runs:
                after = [r["after"] for r in runs]
                found[f"{title}_{exact}{way}"] = statistics.mean(after)
                found[f"{title}_{way}_seeds"] = len(after)
                if len(after) > 1:
                    found[f"{title}_{way}_seed_sd"] = statistics.stdev(after)
        if ways["lora"]:
            found[f"{title}_{exact}before"] = ways["lora"][0]["before"]
        if ways["lora"] and ways["full"]:
            means = [statistics.mean(r["after"] for r in ways[w]) for w in ("lora", "full")]
            found[f"{title}_lora_minus_full_points"] = 100 * (means[0] - means[1])
            found[f"{title}_lora_share"] = ways["lora"][0]["trained"] / ways["full"][0]["trained"]
    for name in ("lora", "full"):
        if grid := done.get(f"rates-films-{name}"):
            found |= {f"minilm_{name}_valid_at_{rate}": value for rate, value in grid.items()}
    if "floors" in done:
        found |= {f"minilm_floor_{name}": value for name, value in done["floors"].items()}
    if "speed" in done:
        own = done["speed"]
        found["smollm2_tokens_per_second"] = own["veneer"]
        found |= {f"smollm2_vs_{v}": own["veneer"] / own[v] for v in ("peft", "compiled")}
    if "memory" in done:
        own = done["memory"]
        found |= {f"smollm2_peak_vs_{v}": own["veneer"] / own[v] for v in ("peft", "compiled")}
    return found


def main() -> None:
    wanted = sys.argv[1:]
    if wanted and wanted[0].startswith("peak-"):
        print(peak(wanted[0].removeprefix("peak-")))
        return
    ways = (("films", "lora"), ("films", "full"), ("calls", "lora"), ("calls", "full"))
    every = [f"{kind}-{way}-{seed}" for seed in SEEDS for kind, way in ways]
    for name in wanted or ["floors", "rates-films-lora", "rates-films-full", *every, "speed", "memory"]:
        done = finished()
        if name not in done:
            done[name] = part(name)
            print(name, done[name], file=sys.stderr)
            STATE.parent.mkdir(parents=True, exist_ok=True)
            STATE.write_text(json.dumps(done, indent=1), encoding="utf-8")
    m.report(Path(__file__).stem, figures(finished()))


if __name__ == "__main__":
    main()
