"""`veneer demo --model`: a chat model learns the intents of a bank's customers, measured by exact answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.embedded import bank
from veneer.models import pretrained
from veneer.models.short_names import place
from veneer.runs.texts import sources, texts
from veneer.tasks import build
from veneer.tasks.text.answering import asked, questions, same_json, text_of
from veneer.train.folder.layout import put
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run
from veneer.verbs.demo.training import trained

ROWS = {"train": 400, "valid": 8, "test": 48}  # valid text is asked at every strength
SHOWN, LENGTH, RANK, RATE = 6, 256, 8, 1e-3
ANSWERS = "answers.json"


def demo(out: str, model: str, *, steps: int, seed: int, fresh: bool, progress: bool) -> dict[str, Any]:
    """Trains the model on the bank's messages and writes the answers before and after into `out`."""
    folder, voice = Path(out), Voice(progress)
    if fresh:
        shutil.rmtree(folder / "bank", ignore_errors=True)
        (folder / ANSWERS).unlink(missing_ok=True)
    run = settings(folder, place(model), steps=steps, seed=seed)
    result = trained(run, progress=progress)
    with voice.phase("asking the test questions"):
        rows = answers(run, result.adapter)
    found = {
        "model": model,
        "steps": result.metrics["steps"],
        "right_before": sum(same_json(r["before"], r["truth"]) for r in rows),
        "right_after": sum(same_json(r["after"], r["truth"]) for r in rows),
        "rows": rows,
        "trainable_parameters": result.metrics["trainable_parameters"],
        "seconds": result.metrics["seconds"],
        "tokens": result.metrics["tokens"],
        "folder": str(result.folder),
        "texts": "synthetic messages; the sentences of the test stand in no message to learn from",
    }
    put(folder / ANSWERS, found)
    return found


def settings(folder: Path, model: str, *, steps: int, seed: int) -> Run:
    """Returns the training, with its rows written beside it."""
    data = folder / "bank-messages"
    data.mkdir(parents=True, exist_ok=True)
    for part, rows in rows_of(seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return Run(
        model=model,
        task="answers",
        task_options={"match": "json"},
        data=(str(data / "train.jsonl"),),
        valid=(str(data / "valid.jsonl"),),
        known=("none",),
        options={"rank": RANK},
        lr=RATE,
        steps=steps,
        batch=1,
        length=LENGTH,
        eval_every=max(1, steps),
        save_every=max(1, steps // 4),
        seed=seed,
        out=str(folder / "bank"),
        resume=True,
    )


def rows_of(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the messages by part; no message is in two of them."""
    n = ROWS["train"]
    learned = bank.rows("train", n + ROWS["valid"], seed)
    return {"train": learned[:n], "valid": learned[n:], "test": bank.rows("test", ROWS["test"], seed)}


def answers(run: Run, adapter: Path) -> list[dict[str, str]]:
    """Returns every test message with its true answer and the model's, before and after."""
    tokenizer = pretrained.tokenizer(run.model)
    task = build(run.task, tokenizer, run, run.task_options)
    rows = sources.rows([str(Path(run.data[0]).with_name("test.jsonl"))], "test")
    every = questions(texts.prepare(rows, task, Notes()).examples)
    model = pretrained.causal_lm(run.model, torch.float32, torch.device("cpu"))
    store.load(model, adapter, "bank")
    found: dict[str, list[str]] = {}
    for when, acting in (("before", []), ("after", ["bank"])):
        with using(model, *acting):
            found[when] = asked(model, tokenizer, every, batch=16)
    said = [_message(text_of(q.prompt, tokenizer), rows) for q in every]
    truths = [text_of(q.truth, tokenizer) for q in every]
    each = zip(said, truths, found["before"], found["after"], strict=True)
    return [{"message": m, "truth": t, "before": b, "after": a} for m, t, b, a in each]


def _message(prompt: str, rows: list[Any]) -> str:
    """Returns the customer's message in a prompt."""
    every = (str(row.columns["messages"][1]["content"]) for row in rows)
    return next((m for m in every if m in prompt), prompt)


def text(found: Mapping[str, Any]) -> str:
    """Returns the result for people: right answers before and after, and samples side by side."""
    n = len(found["rows"])
    lines = [
        f"\n{found['model']} on messages of a bank's customers (synthetic), {found['steps']} steps,"
        f" {found['trainable_parameters']:,} trained parameters",
        "",
        f"right answers: {found['right_before']} of {n} before, {found['right_after']} of {n} after",
    ]
    for row in found["rows"][:SHOWN]:
        right = "right" if same_json(row["after"], row["truth"]) else f"wrong, it is {row['truth']}"
        before = " ".join(row["before"].split())[:80]
        lines += [
            "",
            f"  {row['message']}",
            f"    before  {before}",
            f"    after   {row['after'][:80]}  ({right})",
        ]
    return "\n".join(
        [
            *lines,
            "",
            f"Report: {found['folder']}/report.html    Answers: {Path(found['folder']).parent / ANSWERS}",
            f"Next: veneer generate --chat --adapter {found['folder']} 'my card was stolen'",
        ]
    )
