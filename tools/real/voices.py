"""Two synthetic voices: espeak-ng reads German and Spanish sentences, made of a small stock of phrases."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RATE, SPEED = 16000, 140
COUNTS = {"train": 220, "test": 40}
# Sentences are all combinations of a who, a does and a when; the parts share phrases, never a sentence.
PHRASES = {
    "de": (
        ("Meine Schwester", "Der alte Lehrer", "Unser Nachbar", "Die junge Ärztin", "Mein Freund Peter",
         "Das kleine Kind", "Der Bäcker", "Die Verkäuferin", "Unsere Großmutter", "Der Zugführer"),
        ("liest ein dickes Buch", "kauft frisches Brot", "sucht den Schlüssel", "schreibt einen langen Brief",
         "trinkt eine Tasse Kaffee", "öffnet das große Fenster", "wartet auf den Bus",
         "kocht eine warme Suppe", "repariert das rote Fahrrad", "spielt mit dem Hund"),
        ("am frühen Morgen", "jeden Sonntag", "vor dem Haus", "mit viel Geduld", "seit drei Stunden",
         "in der Küche", "ohne ein Wort", "nach der Arbeit"),
    ),
    "es": (
        ("Mi hermana", "El viejo profesor", "Nuestro vecino", "La joven doctora", "Mi amigo Pedro",
         "El niño pequeño", "El panadero", "La vendedora", "Nuestra abuela", "El conductor del tren"),
        ("lee un libro grande", "compra pan fresco", "busca la llave", "escribe una carta larga",
         "bebe una taza de café", "abre la ventana", "espera el autobús", "cocina una sopa caliente",
         "arregla la bicicleta roja", "juega con el perro"),
        ("por la mañana", "todos los domingos", "delante de la casa", "con mucha paciencia",
         "desde hace tres horas", "en la cocina", "sin decir nada", "después del trabajo"),
    ),
}  # fmt: skip


def convert(unpacked: Path, out: Path) -> None:
    """Writes clips at 16 kHz with their sentences beside them, by language and part. Raises ValueError."""
    for language, parts in PHRASES.items():
        sentences = drawn(language, parts)
        for part, n in COUNTS.items():
            folder = out / language / part
            folder.mkdir(parents=True)
            for i, sentence in enumerate(itertools.islice(sentences, n)):
                speak(unpacked, language, sentence, folder / f"{i:03d}.wav")
                (folder / f"{i:03d}.txt").write_text(sentence + "\n", encoding="utf-8")


def drawn(language: str, parts: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    """Yields different sentences in a fixed random order."""
    import torch

    every = [" ".join(words) + "." for words in itertools.product(*parts)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(len(language)))
    return (every[i] for i in order.tolist())


def speak(unpacked: Path, language: str, sentence: str, out: Path) -> None:
    """Writes a sentence as a clip. Raises ValueError if espeak-ng fails."""
    libraries = sorted({str(p.parent) for p in unpacked.rglob("libespeak-ng.so*")})
    (data,) = [p for p in unpacked.rglob("espeak-ng-data") if (p / "phontab").is_file()]
    (program,) = [p for p in unpacked.rglob("bin/espeak-ng") if p.is_file()]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.wav"
        command = [str(program), f"--path={data.parent}", "-v", language, "-s", str(SPEED), "-w", str(raw)]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
        done = subprocess.run([*command, sentence], env=environment, capture_output=True, text=True)
        if done.returncode or not raw.is_file():
            raise ValueError(f"espeak-ng cannot read {sentence!r}: {done.stderr.strip()}")
        with wave.open(str(raw)) as clip:
            samples, rate = clip.readframes(clip.getnframes()), clip.getframerate()
    with wave.open(str(out), "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(RATE)
        clip.writeframes(resampled(samples, rate))


def resampled(samples: bytes, rate: int) -> bytes:
    """Returns 16-bit samples at 16 kHz: the spectrum of the whole clip, cut at 8 kHz."""
    import torch

    x: Any = torch.frombuffer(bytearray(samples), dtype=torch.int16).double()
    n = round(len(x) * RATE / rate)
    y = torch.fft.irfft(torch.fft.rfft(x)[: n // 2 + 1], n) * (n / len(x))
    written: bytes = y.clamp(-32768, 32767).round().to(torch.int16).numpy().tobytes()
    return written
