"""Measures DPO: peak memory and time of a step beside TRL's, whose reference is a second base or PEFT's.

python bench/preferences.py [variant]
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import _measure as m
import memory
import torch

SIZE, VOCABULARY, PAIRS, PROMPT, ANSWER, STEPS = "h512", 32000, 4, 64, 128, 2
VARIANTS = ("veneer", "trl", "trl_peft")


def rows(tokenizer: Any) -> list[dict[str, str]]:
    """Returns pairs of about PROMPT and ANSWER tokens, cut from one text."""
    from veneer.embedded import folder

    ids = tokenizer((folder().parent / "heldout.txt").read_text(encoding="utf-8"))["input_ids"]
    cuts, found = (PROMPT, PROMPT + ANSWER, PROMPT + 2 * ANSWER), []
    for i in range(PAIRS):
        own = ids[8 * i : 8 * i + cuts[-1]]
        parts = (own[: cuts[0]], own[cuts[0] : cuts[1]], own[cuts[1] :])
        found.append(dict(zip(("prompt", "chosen", "rejected"), map(tokenizer.decode, parts), strict=True)))
    return found


def ours(model: Any, tokenizer: Any) -> m.Step:
    """Returns a step of Veneer's task."""
    import veneer
    from veneer.data.reading import Reading
    from veneer.data.row_files import Row
    from veneer.integrations.optimisers import build_optimiser
    from veneer.tasks import build

    veneer.attach(model, "lora", rank=m.RANK, alpha=m.ALPHA)
    task, optimiser = build("dpo", tokenizer, Reading(length=512)), build_optimiser(model, lr=1e-4)
    every = [task.encode(Row("prompt-pairs", row, str(i))) for i, row in enumerate(rows(tokenizer))]
    batch = task.collate([piece for one in every for piece in task.pieces(one, 512)])

    def step() -> None:
        loss, n = task.loss(model.train(), batch)
        (loss / n).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def theirs(model: Any, tokenizer: Any, variant: str) -> m.Step:
    """Returns the steps of TRL's trainer: with a second base, or with PEFT's adapters off."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    import veneer

    given: dict[str, Any] = {}
    if variant == "trl":
        given["ref_model"] = copy.deepcopy(model)
        veneer.attach(model, "lora", rank=m.RANK, alpha=m.ALPHA)
    else:
        given["peft_config"] = LoraConfig(r=m.RANK, lora_alpha=m.ALPHA, target_modules="all-linear")
    args = DPOConfig(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=PAIRS,
        learning_rate=1e-4,
        max_length=512,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    data = Dataset.from_list(rows(tokenizer))
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **given)
    return trainer.train


def measure(variant: str) -> dict[str, float]:
    """Returns bytes over a process without a model, and seconds of a step on one thread."""
    import datasets  # noqa: F401  (all variants have the same imports)
    import peft  # noqa: F401
    from transformers import AutoTokenizer
    from trl import DPOTrainer  # noqa: F401

    from veneer.embedded import folder

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rows(tokenizer)
    before = memory.resident()
    with memory.Peak() as peak:
        model = m.llama(SIZE, VOCABULARY, torch.bfloat16)
        if variant == "veneer":
            one = ours(model, tokenizer)
            step = lambda: [one() for _ in range(STEPS)]  # noqa: E731
        else:
            step = theirs(model, tokenizer, variant)
        begun = time.process_time()
        step()
        seconds = (time.process_time() - begun) / STEPS
    return {"bytes": float(peak.bytes - before), "seconds": seconds}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    found = {}
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, __file__, variant], check=True, capture_output=True, text=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
        print(f"{variant}: {found[variant]}", file=sys.stderr, flush=True)
    own, figures = found["veneer"], {}
    for peer in VARIANTS[1:]:
        figures[f"dpo_memory_vs_{peer}"] = own["bytes"] / found[peer]["bytes"]
        figures[f"dpo_step_vs_{peer}"] = found[peer]["seconds"] / own["seconds"]
    m.report("preferences", figures)


if __name__ == "__main__":
    main()
