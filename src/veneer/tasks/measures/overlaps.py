"""BLEU and ROUGE of written texts against true ones, by sacrebleu and rouge_score."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from veneer.tasks.base.figure import Figure, Metric

BLEU = Metric("bleu", "BLEU", lower_is_better=False)
ROUGE = Metric("rougeL", "ROUGE-L", lower_is_better=False)


def figures(written: Sequence[str], truths: Sequence[str]) -> list[Figure]:
    """Returns BLEU of all texts together (0 to 100), and the mean ROUGE-L (0 to 1)."""
    import sacrebleu

    bleu = sacrebleu.corpus_bleu(list(written), [list(truths)]).score
    each = torch.tensor([rouge(w, t) for w, t in zip(written, truths, strict=True)]).double()
    return [Figure(BLEU.name, float(bleu), BLEU.unit, False), Figure.of(ROUGE, each, torch.ones_like(each))]


def rouge(written: str, truth: str) -> float:
    """Returns the F-measure of the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(truth, written)["rougeL"].fmeasure)
