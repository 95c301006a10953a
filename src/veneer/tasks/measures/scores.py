"""Figures of classes, numbers and texts, computed by the metrics libraries of the field."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veneer.errors import ConfigError
from veneer.tasks.base.figure import Figure, Metric

ACCURACY = Metric("accuracy", "accuracy", lower_is_better=False)
PEARSON = Metric("pearson", "Pearson correlation", lower_is_better=False)
SQUARED = Metric("mse", "mean squared error")


def check_packages(task: str, packages: Mapping[str, str]) -> None:
    """Raises ConfigError naming missing packages. packages: names for pip by module."""
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(f"task {task!r} needs {' and '.join(missing)}: pip install 'veneer[metrics]'")


def of_classes(truths: Sequence[int], answers: Sequence[int], n: int) -> list[Figure]:
    """Returns accuracy, F1 (of class 1 of two, else the mean over classes) and Matthews correlation."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    right = (torch.tensor(truths) == torch.tensor(answers)).double()
    kind = {"average": "binary"} if n == 2 else {"average": "macro", "labels": list(range(n))}
    f1 = float(f1_score(truths, answers, zero_division=0, **kind))
    mcc = float(matthews_corrcoef(truths, answers)) if len({*truths, *answers}) > 1 else 0.0
    return [
        Figure.of(ACCURACY, right, torch.ones_like(right)),
        Figure("f1", f1, "F1", lower_is_better=False),
        Figure("mcc", mcc, "Matthews correlation", lower_is_better=False),
    ]


def of_numbers(truths: Tensor, answers: Tensor) -> list[Figure]:
    """Returns Pearson's and Spearman's correlation, 0 for constant numbers, and the mean squared error."""
    from scipy.stats import rankdata

    ranks = [torch.tensor(rankdata(x.numpy())) for x in (truths, answers)]
    squared = (truths - answers).square().double()
    return [
        Figure(PEARSON.name, correlation(truths, answers), PEARSON.unit, PEARSON.lower_is_better),
        Figure("spearman", correlation(*ranks), "Spearman correlation", lower_is_better=False),
        Figure.of(SQUARED, squared, torch.ones_like(squared)),
    ]


def correlation(a: Tensor, b: Tensor) -> float:
    """Returns Pearson's correlation of two vectors; 0 if one of them is constant."""
    from scipy.stats import pearsonr

    if len(a) < 2 or float(a.max()) == float(a.min()) or float(b.max()) == float(b.min()):
        return 0.0
    return float(pearsonr(a.double().numpy(), b.double().numpy()).statistic)
