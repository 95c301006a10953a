"""Compares LoRA-GA's first step from one streaming pass with the best step of rank 2r.

    python bench/loraga.py

64 windows of 256 tokens of the standard library's prose, all linear layers. The gradient of every weight is
also taken whole; figures are cosines with its best rank-2r part (mean and worst over layers) of the first
step of gradient descent from calibrate()'s start, and of LoRA's usual one; and what the sketches and a
calibration take, in shares of the whole gradients.
"""

from __future__ import annotations

import time

import _measure as m
import torch
from torch import Tensor, nn

import veneer
from veneer import embedded
from veneer.embedded import texts
from veneer.methods import Stats

WINDOWS, BATCH, LENGTH, RANKS = 64, 8, 256, (4, 8, 16)


def batches() -> list[dict[str, Tensor]]:
    """Returns windows evenly spaced over the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.folder())
    ids = [i for d in texts.domain("prose", "train") for i in tokenizer(d.text, verbose=False)["input_ids"]]
    starts = torch.linspace(0, len(ids) - LENGTH, WINDOWS).long().tolist()
    rows = torch.tensor([ids[s : s + LENGTH] for s in starts])
    return [{"input_ids": b, "labels": b} for b in rows.split(BATCH)]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


def dense(model: nn.Module, some: list[dict[str, Tensor]], sites: list[str]) -> dict[str, Tensor]:
    """Returns the gradient (out, in) of the summed loss in every layer's weight."""
    weights = {n: model.get_parameter(f"{n}.weight").requires_grad_(True) for n in sites}
    for b in some:
        loss(model, b).backward()
    return {n: p.grad for n, p in weights.items() if p.grad is not None}


def cosine(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum() / X.norm() / Y.norm())


def cosines(G: Tensor, stats: Stats, rank: int) -> tuple[float, float]:
    """Returns cosines with G's best part of rank 2r: of the sketch's first step, and of LoRA's usual one."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = (U[:, : 2 * rank] * S[: 2 * rank]) @ Vh[: 2 * rank]
    A, B = stats.gradient.Vh[:rank], stats.gradient.U[:, rank : 2 * rank]
    random = torch.randn(rank, G.shape[1], generator=torch.Generator().manual_seed(0))
    return cosine(G @ A.mT @ A + B @ (B.mT @ G), best), cosine(G @ random.mT @ random, best)


def main() -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = (
        AutoModelForCausalLM.from_pretrained(embedded.folder(), dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    some, figures = batches(), {}
    began = time.process_time()
    found = {r: veneer.calibrate(model, some, rank=r, loss=loss) for r in RANKS}
    each = (time.process_time() - began) / len(RANKS)
    began = time.process_time()
    whole = dense(model, some, list(found[RANKS[0]]))
    figures["time_over_whole_gradients"] = each / (time.process_time() - began)
    for r in RANKS:
        both = [cosines(G, found[r][n], r) for n, G in whole.items()]
        for name, values in zip(
            (f"r{r}_cosine", f"r{r}_plain_lora_cosine"), zip(*both, strict=True), strict=True
        ):
            figures[f"{name}_mean"], figures[f"{name}_worst"] = sum(values) / len(values), min(values)
        kept = sum(min(4 * r * G.shape[0] + (8 * r + 1) * G.shape[1], G.numel()) for G in whole.values())
        figures[f"r{r}_sketch_size"] = kept / sum(G.numel() for G in whole.values())
    m.report("loraga", figures)


if __name__ == "__main__":
    main()
