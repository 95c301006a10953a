"""Whisper-base and a synthetic German voice: a short training, its file, and two adapters in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from veneer import tasks
from veneer.data.media import folders
from veneer.data.reading import Reading
from veneer.models import pretrained

pytestmark = pytest.mark.real
NAME, WINDOW = "speech-recognition", 5.2  # seconds; the voice's clips are shorter
CPU = torch.device("cpu")


def whisper(folder: Path) -> Any:
    return pretrained.model(str(folder), tasks.get(NAME).AUTO, torch.float32, CPU)


def clips(voices: Path, task: Any, part: str, n: int) -> list[Any]:
    rows = folders.rows(voices / "de", part, task.MEDIA)
    return [task.pieces(task.encode(row), 64)[0] for row in rows[:n]]


def loss(task: Any, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    total, n = task.loss(model, batch)
    return total / n


@torch.no_grad()
def logits(task: Any, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = task.hidden(model, batch)
    found: torch.Tensor = model(
        encoder_outputs=(hidden,), decoder_input_ids=batch["decoder_input_ids"]
    ).logits
    return found


def test_whisper_learns_a_voice_and_shares_a_batch_with_another(real, tmp_path):
    folder, voices = real("whisper"), real("voices")
    processor = pretrained.processor(str(folder), tasks.get(NAME).PROCESSOR)
    task = tasks.build(NAME, processor, Reading(length=64), {"language": "de", "seconds": WINDOW})
    test, train = clips(voices, task, "test", 2), clips(voices, task, "train", 3)
    model = whisper(folder)
    assert 0.3 < task.measure(model, test, batch=2)[0].value < 1.5  # it can hardly read the voice

    veneer.attach(model, "lora", name="voice", rank=8, alpha=16, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam, batch = torch.optim.AdamW(trained, lr=2e-3), task.collate(train)
    losses = []
    for _ in range(5):
        found = loss(task, model, batch)
        losses.append(float(found.detach()))
        adam.zero_grad()
        found.backward()
        adam.step()
    assert losses[-1] < 0.8 * losses[0], losses
    model.eval()
    veneer.save(model, tmp_path / "voice", "voice")

    both = task.collate([test[0], test[0]])  # two rows of one clip, for two adapters
    expected = logits(task, model, both)
    again = whisper(folder)
    veneer.load(again, tmp_path / "voice", name="voice")
    assert torch.equal(logits(task, again, both), expected)

    veneer.attach(again, "lora", name="other", rank=4, seed=1)
    with torch.no_grad():
        for key, p in again.named_parameters():
            if ".other.B" in key:
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    alone = {}
    for name in ("voice", "other"):
        with veneer.using(again, name):
            alone[name] = logits(task, again, both)
    assert torch.equal(alone["voice"], expected)
    assert not torch.allclose(alone["voice"], alone["other"], atol=0.1)
    rows = veneer.bank(again, {"voice": "voice", "other": "other"})
    rows.use(["other", "voice"])
    together = logits(task, again, both)
    for i, name in enumerate(("other", "voice")):
        assert torch.allclose(together[i], alone[name][i], atol=2e-3), name
