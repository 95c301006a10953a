"""Draws docs/proof.png from the recorded figures of real weights.

python bench/_proof_pictures.py docs/proof.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from veneer.analyse.page import figures
from veneer.analyse.page.figures import PALETTE

RESULTS = Path(__file__).parent / "results"
BEFORE, LORA, FULL = PALETTE["quiet"], PALETTE["learned"], PALETTE["muted"]
PANELS = {
    "SmolLM2: function calls\nshare of exact answers": {
        "before": ("real", "smollm2_exact_before", BEFORE),
        "LoRA": ("real", "smollm2_exact_lora", LORA),
        "full": ("real", "smollm2_exact_full", FULL),
    },
    "MiniLM: film sentences\naccuracy": {
        "TF-IDF": ("real", "minilm_floor_tfidf", BEFORE),
        "LoRA": ("real", "minilm_lora", LORA),
        "full": ("real", "minilm_full", FULL),
    },
    "Whisper: two voices, one batch\nshare of wrong words": {
        "German\nbefore": ("senses", "wer_de_before", BEFORE),
        "German\nLoRA": ("senses", "wer_de_after", LORA),
        "Spanish\nbefore": ("senses", "wer_es_before", BEFORE),
        "Spanish\nLoRA": ("senses", "wer_es_after", LORA),
    },
    "Fashion-MNIST, 1,000 labels\naccuracy": {
        "ViT\nprobe": ("senses", "vit_linear_probe", BEFORE),
        "ViT\nLoRA": ("senses", "vit_lora", LORA),
        "ViT\nfull": ("senses", "vit_full", FULL),
        "CNN\nprobe": ("senses", "mobilenet_linear_probe", BEFORE),
        "CNN\nLoRA": ("senses", "mobilenet_lora", LORA),
        "CNN\nfull": ("senses", "mobilenet_full", FULL),
    },
}


def fill(panel: Any, title: str, bars: dict[str, tuple[str, str, str]], found: dict[str, Any]) -> None:
    """Draws the bars of one panel that were measured, with deviations over seeds where there are some."""
    known = {name: bar for name, bar in bars.items() if bar[1] in found[bar[0]]}
    for at, (bench, figure, colour) in enumerate(known.values()):
        value = found[bench][figure]
        spread = next(
            (found[bench][k] for k in (f"{figure}_sd", f"{figure}_seed_sd") if k in found[bench]), 0
        )
        panel.bar(at, value, 0.7, color=colour, yerr=spread or None, capsize=3)
        panel.text(at, value + spread + 0.02, f"{value:.2f}", ha="center", fontsize=7)
    panel.set_xticks(range(len(known)), list(known), fontsize=7)
    panel.set_ylim(0, 1.1)
    panel.set_title(title, fontsize=8)


def main() -> None:
    found = {
        bench: json.loads((RESULTS / f"{bench}.json").read_text(encoding="utf-8"))["figures"]
        for bench in ("real", "senses")
    }
    with figures.style():
        figure = figures.blank((7.6, 5.4))
        for panel, (title, bars) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            fill(panel, title, bars, found)
        figures.keep(figure, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
