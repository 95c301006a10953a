"""Compression of SmolLM2-135M: perplexity of English text by the papers' protocol, and exact answers kept.

VENEER_REAL=FOLDER python bench/compress_real.py        (make real KEYS=smollm2)

Calibrated on 32 windows of 256 tokens of the interpreter's own documentation. Perplexity: the test texts,
joined by two newlines and tokenised once; the mean over the 2,047 predictions of the first window of 2,048
tokens, in float32. Exact answers: capitals of 40 countries, every token
of the answer the likeliest. Refinement for 2 epochs. The weights are dequantised from 4 bits: compare their
figures with each other, never with published ones. Every measurement stays in runs/bench-compress-real and
is not made again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import _measure as m
import torch
import torch.nn.functional as F

from veneer.compress import folder as folders
from veneer.compress.compress import put_blocks
from veneer.compress.lowrank import plan
from veneer.compress.lowrank.blockwise import Job
from veneer.compress.lowrank.recipe import recipe
from veneer.compress.lowrank.sources import Held
from veneer.compress.lowrank.work import Work
from veneer.compress.quantise import quantise
from veneer.embedded import texts
from veneer.ops.draws import keyed
from veneer.sites import find

KEPT = Path("runs") / "bench-compress-real"
FOLDER = Path(os.environ.get("VENEER_REAL", ".real")) / "smollm2"
WINDOWS, LENGTH, LONG, EPOCHS = 32, 256, 2048, 2
CELLS = [
    *(("no refine", keep) for keep in (0.9, 0.8, 0.6)),
    *((method, 0.8) for method in ("svd", "lord", "svd-llm", "auto")),
]
NF4 = [("dense", None), ("lord", 0.8), ("auto", 0.8)]  # measured in nf4 too
CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna, "
    "Hungary Budapest, Poland Warsaw, Russia Moscow, Ukraine Kyiv, Sweden Stockholm, Norway Oslo, "
    "Denmark Copenhagen, Finland Helsinki, Ireland Dublin, Belgium Brussels, Japan Tokyo, China Beijing, "
    "Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Turkey Ankara, Iran Tehran, Iraq Baghdad, "
    "Egypt Cairo, Kenya Nairobi, Ethiopia Addis_Ababa, Morocco Rabat, Cuba Havana, Peru Lima, "
    "Chile Santiago, "
    "Argentina Buenos_Aires, Colombia Bogotá, Venezuela Caracas, Ecuador Quito, Canada Ottawa, "
    "Australia Canberra, Lebanon Beirut, Syria Damascus"
)


def dense() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval().requires_grad_(False)


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def joined(split: str) -> torch.Tensor:
    """The tokens (n,) of a split's documents, joined by two newlines."""
    text = "\n\n".join(d.text for d in texts.domain("prose", split))
    ids: torch.Tensor = tokenizer()(text, return_tensors="pt")["input_ids"][0]
    return ids


def calibration() -> list[dict[str, torch.Tensor]]:
    """Windows of tokens, drawn without replacement, one a batch."""
    whole = joined("train")
    starts = torch.randperm(len(whole) // LENGTH, generator=keyed(0, "windows"))[:WINDOWS] * LENGTH
    return [{"input_ids": whole[None, s : s + LENGTH]} for s in starts.tolist()]


@torch.no_grad()
def perplexity(model: Any) -> float:
    ids = joined("test")[None, :LONG]
    nats = float(F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]))
    if not math.isfinite(nats):
        raise RuntimeError("the window's loss is not finite")
    return math.exp(nats)


@torch.no_grad()
def exact(model: Any) -> float:
    """The share of capitals whose every token is the likeliest after "The capital of COUNTRY is"."""
    right, pairs, read = 0, [p.split(" ") for p in CAPITALS.split(", ")], tokenizer()
    for country, capital in pairs:
        prompt = read(f"The capital of {country} is")["input_ids"]
        answer = read(f" {capital.replace('_', ' ')}")["input_ids"]
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        right += logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    return right / len(pairs)


def compressed(method: str, keep: float) -> Any:
    """The model by one method at one ratio."""
    changed = {"refine": 0} if method == "no refine" else {"refine": EPOCHS} if method == "auto" else {}
    chosen = recipe("auto" if method == "no refine" else method, keep, **changed)
    source, folder = Held(dense(), "all-linear", ()), KEPT / "work" / f"{method}-{keep}"
    work = Work(folder, chosen.as_dict())
    Job(source, calibration(), chosen, work, torch.float32, surveys=Work(KEPT / "work" / "survey", {})).run()
    put_blocks(source, work)
    return source.model.eval()


def cell(method: str, keep: float | None) -> dict[str, float]:
    """Perplexity and exact answers of one model."""
    path = KEPT / f"{method}-{keep}.json"
    if path.is_file():
        kept: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    model = dense() if keep is None else compressed(method, keep)
    found = {"perplexity": perplexity(model), "exact": exact(model)}
    if (method, keep) in NF4:
        quantise(model, "nf4")
        found["nf4_perplexity"] = perplexity(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    shutil.rmtree(KEPT / "work" / f"{method}-{keep}", ignore_errors=True)
    print(method, keep, found, flush=True)
    return found


def nf4_bytes(keep: float | None) -> float:
    """Bytes of the model with its layers, or LoRD's factors of them, in nf4 and the rest in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.bfloat16)
    if keep is not None:
        sizes = {s.name: plan.Size(s.out, s.in_, False) for s in find(model)}
        form = {"form": "plain", "bias": True}
        layers = {
            n: {**form, "out": sizes[n].out, "in": sizes[n].in_, "rank": cut.rank}
            for n, cut in plan.uniform(sizes, recipe("lord", keep)).items()
        }
        folders.put_layers(model, {"layers": layers}, torch.bfloat16)
    quantise(model, "nf4")
    return float(sum(t.nbytes for t in folders.weights(model).values()))


def main() -> None:
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    rows = {(method, keep): cell(method, keep) for method, keep in [("dense", None), *CELLS]}
    for (method, keep), row in rows.items():
        at = method.replace(" ", "_").replace("-", "_") + (
            "" if keep is None else f"_keep{round(100 * keep)}"
        )
        figures |= {f"real_{at}_{name}": value for name, value in row.items()}
    figures["real_qlora_bytes"], figures["real_qlora_over_lord_bytes"] = nf4_bytes(None), nf4_bytes(0.8)
    figures["real_qlora_over_lord_saved"] = 1 - nf4_bytes(0.8) / nf4_bytes(None)
    m.report("compress_real", figures)


if __name__ == "__main__":
    main()
