"""Whisper-base learns two synthetic voices, one adapter for each, and reads both in one batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import veneer
from veneer import tasks
from veneer.data.media import folders
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.models import pretrained
from veneer.tasks.senses.words import word_errors

NAME, LANGUAGES = "speech-recognition", ("de", "es")
WINDOW = 5.2  # seconds of the clips to learn
LENGTHS = {"de": WINDOW, "es": WINDOW, "en": 8.0}  # the human English clips are longer
STEPS, BATCH, RATE, RANK, MEASURED = 26, 4, 2e-3, 16, 16
CPU = torch.device("cpu")


def task(real: Path, language: str, seconds: float) -> Any:
    """Returns the task for a language, on windows of so many seconds."""
    processor = pretrained.processor(str(real / "whisper"), tasks.get(NAME).PROCESSOR)
    return tasks.build(NAME, processor, Reading(length=64), {"language": language, "seconds": seconds})


def whisper(real: Path) -> Any:
    """Returns the model in float32."""
    return pretrained.model(str(real / "whisper"), tasks.get(NAME).AUTO, torch.float32, CPU)


def clips(real: Path, own: Any, language: str, part: str) -> list[Any]:
    """Returns the examples of a voice."""
    rows = folders.rows(real / "voices" / language, part, own.MEDIA) or []
    return [own.pieces(own.encode(row), 64)[0] for row in rows]


def human(real: Path, own: Any) -> list[Any]:
    """Returns five clips of human English."""
    (index,) = real.glob("speech/usr/share/**/librivox/transcription")
    found = []
    for line in index.read_text(encoding="utf-8").splitlines():
        words, _, name = line.rpartition("(")
        text = words.replace("<s>", "").replace("</s>", "").strip()
        columns = {"audio": str(index.parent / f"{name.rstrip(') ')}.wav"), "text": text}
        found.append(own.pieces(own.encode(Row("audio", columns, name)), 64)[0])
    return found


def wer(own: Any, model: Any, examples: list[Any], batch: int = 16) -> float:
    """Returns the word error rate."""
    return float(own.measure(model, examples, batch=batch)[0].value)


def before(real: Path, language: str) -> dict[str, float]:
    """Returns the base's word errors: on whole windows of 30 s, and on the short ones of the training."""
    model, found = whisper(real), {}
    for suffix, seconds in (("", 30.0), ("_short", LENGTHS[language])):
        own = task(real, language, seconds)
        some = human(real, own) if language == "en" else clips(real, own, language, "test")[:MEASURED]
        found[f"wer_{language}_before{suffix}"] = wer(own, model, some, 8)
    return found


def learn(real: Path, language: str, out: Path) -> dict[str, float]:
    """Trains the adapter of a voice, saves it, and returns its word errors, and those on human English."""
    model, own = whisper(real), task(real, language, WINDOW)
    examples = clips(real, own, language, "train")
    veneer.attach(model, "lora", rank=RANK, alpha=2 * RANK, name=language, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, RATE, total_steps=STEPS, pct_start=0.1)
    draw, began = torch.Generator().manual_seed(0), time.monotonic()
    order = torch.cat([torch.randperm(len(examples), generator=draw) for _ in range(3)]).tolist()
    model.train()
    for step in range(STEPS):
        some = [examples[i] for i in order[step * BATCH : (step + 1) * BATCH]]
        total, n = own.loss(model, own.collate(some))
        (total / n).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
        if step % 5 == 0:
            print(language, step, float(total.detach()) / n, f"{time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    veneer.save(model, out / language, language)
    long = task(real, "en", LENGTHS["en"])
    size = sum(p.numel() for p in parameters) / sum(p.numel() for p in model.parameters())
    return {
        f"wer_{language}_alone": wer(own, model, clips(real, own, language, "test")[:MEASURED]),
        f"wer_en_after_{language}": wer(long, model, human(real, long)),
        "whisper_trained_share": size,
    }


@torch.no_grad()
def together(real: Path, out: Path) -> dict[str, float]:
    """Returns word errors of both voices, read in batches that hold both, each row with its own adapter."""
    model = whisper(real)
    rows = veneer.bank(model, {language: str(out / language) for language in LANGUAGES})
    own = {language: task(real, language, WINDOW) for language in LANGUAGES}
    texts = {language: clips(real, t, language, "test")[:MEASURED] for language, t in own.items()}
    errors = {language: [0, 0] for language in LANGUAGES}
    for at in range(0, MEASURED, 8):
        some = [
            (language, e)
            for pair in zip(*texts.values(), strict=True)
            for language, e in zip(texts, pair, strict=True)
        ]
        mixed = some[2 * at : 2 * (at + 8)]
        rows.use([language for language, _ in mixed])
        batch: dict[str, Tensor] = own["de"].collate([e for _, e in mixed])
        for (language, e), text in zip(mixed, own["de"].write(model, batch), strict=True):
            wrong, words = word_errors(own[language].truth(e), text)
            errors[language][0] += wrong
            errors[language][1] += words
    return {f"wer_{language}_after": wrong / words for language, (wrong, words) in errors.items()}
