"""Measures useful tokens per second in supervised fine-tuning on texts of lognormal lengths.

Veneer packs texts into windows of 256 tokens, in which longer texts are cut and their parts no longer see
each other, and once more into windows of 1024, in which all are whole (`_w1024`), and learns from labels
only. PEFT pads batches of 8, at random or of like length, and at its best (adapters in the model's dtype,
fused AdamW, compiled, lengths padded to multiples of 64) too. The unmeasured rounds are whole epochs, so that
every length of either side is compiled before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import _measure as m
import torch
from torch import Tensor

SIZE, VOCABULARY, TEXTS, ROWS, LONGEST, BUCKET = "h512", 32000, 64, 8, 1024, 64
SHORT, WHOLE = 256, 1024  # windows
TOKENS = ROWS // 2 * SHORT  # of a batch of windows


def texts(seed: int = 0) -> list[Tensor]:
    """Token ids of texts with such lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = (
        torch.exp(torch.log(torch.tensor(110.0)) + 0.8 * torch.randn(TEXTS, generator=draw))
        .round()
        .long()
        .clamp(8, LONGEST)
    )
    return [torch.randint(0, VOCABULARY, (int(n),), generator=draw) for n in lengths]


def padded(rows: Sequence[Tensor], multiple: int = 1) -> dict[str, Tensor]:
    """Returns a batch as transformers takes it; the first half of every text is prompt."""
    longest = -(-max(len(r) for r in rows) // multiple) * multiple
    batch = dict(
        input_ids=torch.zeros(len(rows), longest, dtype=torch.long),
        labels=torch.full((len(rows), longest), -100),
    )
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for i, r in enumerate(rows):
        batch["input_ids"][i, : len(r)], batch["attention_mask"][i, : len(r)] = r, 1
        batch["labels"][i, len(r) // 2 : len(r)] = r[len(r) // 2 :]
    return batch


def batches(found: list[Tensor], *, grouped: bool, multiple: int = 1) -> list[dict[str, Tensor]]:
    """Padded batches of ROWS texts, in the order given or by length."""
    ordered = sorted(found, key=len) if grouped else found
    return [padded(ordered[i : i + ROWS], multiple) for i in range(0, len(ordered), ROWS)]


def windows(found: list[Tensor], length: int) -> list[dict[str, Tensor]]:
    """Veneer's batches of TOKENS: texts packed into windows of `length` by its own code, a longer one cut."""
    from veneer.data import pack
    from veneer.train.speed import compiling

    widths, pieces = compiling.widths(length, True), []
    for text in found:
        labels = text[1:].clone()
        labels[: len(text) // 2 - 1] = pack.IGNORED
        whole = pack.Segment(text[:-1], labels, torch.zeros_like(labels))
        cut = [pack.Segment(*(t[i : i + length] for t in whole)) for i in range(0, len(labels), length)]
        pieces += [s for s in cut if bool((s.labels != pack.IGNORED).any())]
    packed, rows = pack.pack(pieces, length), TOKENS // length
    return [pack.collate(packed[i : i + rows], 0, widths) for i in range(0, len(packed), rows)]


def peer(found: list[Tensor], *, grouped: bool, best: bool) -> m.Step:
    """Returns an epoch of PEFT."""
    model = m.peft_model(m.llama(SIZE, VOCABULARY, torch.bfloat16), best=best)
    adam, every = (
        m.optimiser(model, fused=best),
        batches(found, grouped=grouped, multiple=BUCKET if best else 1),
    )

    def act() -> None:
        for batch in every:
            m.peer_step(model, adam, batch)

    return act


def ours(found: list[Tensor], length: int) -> m.Step:
    """Returns an epoch of Veneer in windows of `length`."""
    from veneer.train.speed.compiling import prepare

    model, every = m.veneer_model(m.llama(SIZE, VOCABULARY, torch.bfloat16)), windows(found, length)
    objective: Any = prepare(model, m.language_task(), every[0], compiled=True)
    adam = m.optimiser(model, fused=True)

    def act() -> None:
        for batch in every:
            m.our_step(model, objective, adam, batch)

    return act


def main() -> None:
    torch._dynamo.config.recompile_limit = 64  # for all three compiled variants, which share the model's code
    found = texts()
    steps = {"veneer": ours(found, SHORT), "whole": ours(found, WHOLE)}
    steps |= {
        "padded": peer(found, grouped=False, best=False),
        "grouped": peer(found, grouped=True, best=False),
    }
    steps["compiled"] = peer(found, grouped=True, best=True)
    seconds = m.interleaved(steps)
    useful = sum(map(len, found))
    print({k: f"{useful / v:.0f} tokens/s" for k, v in seconds.items()}, file=sys.stderr)
    print(
        f"{sum(len(t) > SHORT + 1 for t in found)} of {len(found)} texts are longer than {SHORT} tokens and"
        " cut",
        file=sys.stderr,
    )
    names = {
        "vs_padded_peft": "padded",
        "vs_length_grouped_peft": "grouped",
        "vs_length_grouped_compiled": "compiled",
    }
    figures = {figure: seconds[k] / seconds["veneer"] for figure, k in names.items()}
    m.report(
        "sft", figures | {f"{figure}_w{WHOLE}": seconds[k] / seconds["whole"] for figure, k in names.items()}
    )


if __name__ == "__main__":
    main()
