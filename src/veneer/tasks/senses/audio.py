"""Reads clips of sound: 16-bit PCM .wav files as tensors."""

from __future__ import annotations

import base64
import io
import wave

import torch
from torch import Tensor

from veneer.data.media.files import opened
from veneer.data.row_files import Row
from veneer.errors import DataError

CONVERT = "convert it: ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav"


def read(row: Row, column: str, rate: int, longest: float) -> Tensor:
    """Returns the clip (samples,) between -1 and 1; several channels are averaged.

    rate: samples a second that the model takes; longest: seconds. Raises DataError, naming the row, for a
    clip that is missing, no PCM, of another rate, cut, empty, silent or too long.
    """
    with opened(row, column) as file:
        name = f"{row.where}: the {column} {getattr(file, 'name', 'in it')}"
        try:
            with wave.open(file) as clip:
                shape = clip.getparams()
                raw = clip.readframes(shape.nframes)
        except (wave.Error, EOFError) as e:
            raise DataError(
                f"{name} must be a .wav file of 16-bit PCM: {e or 'it ends early'};"
                f" {CONVERT.format(rate=rate)}"
            ) from None
    if shape.sampwidth != 2:
        raise DataError(f"{name} must be of 16 bits, got {8 * shape.sampwidth}; {CONVERT.format(rate=rate)}")
    if shape.framerate != rate:
        raise DataError(
            f"{name} must have {rate} samples a second, got {shape.framerate}; {CONVERT.format(rate=rate)}"
        )
    whole = shape.nframes * shape.nchannels * shape.sampwidth
    if len(raw) < whole:
        raise DataError(f"{name} must be a whole file, got {len(raw)} of {whole} bytes of sound; replace it")
    found = torch.frombuffer(bytearray(raw), dtype=torch.int16) if raw else torch.zeros(0, dtype=torch.int16)
    if not found.any():
        raise DataError(f"{name} must hold sound, got {'silence' if len(found) else 'no sample'}")
    found = found.view(-1, shape.nchannels).float().mean(1) / 32768
    if len(found) > longest * rate:
        raise DataError(f"{name} must be at most {longest:g} s long, got {len(found) / rate:.1f} s; cut it")
    return found


def as_wav(samples: Tensor, rate: int) -> bytes:
    """Returns a clip (samples,) between -1 and 1 as the bytes of a .wav file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(rate)
        clip.writeframes((samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
    return out.getvalue()


def as_uri(samples: Tensor, rate: int) -> str:
    """Returns a clip (samples,) as a data URI that a browser plays."""
    return f"data:audio/wav;base64,{base64.b64encode(as_wav(samples, rate)).decode()}"
