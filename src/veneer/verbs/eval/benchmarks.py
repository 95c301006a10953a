"""Benchmarks of lm-eval: finds them by name and runs them on a model in memory."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, DataError, suggest
from veneer.tasks import Figure


class UnknownTask(ConfigError):
    """Raised for an unknown benchmark, before anything is measured."""

    exit_code = 3


class Known(NamedTuple):
    """Names of tasks, groups and tags, and lm-eval's manager of them."""

    names: list[str]
    manager: Any


class Options(NamedTuple):
    """shots: None for the task's own number; examples: None for all."""

    shots: int | None
    chat: bool
    examples: int | None
    batch: int


class Answered(NamedTuple):
    """A figure of a benchmark over n examples."""

    task: str
    n: int
    figure: Figure


def find(names: Sequence[str], folder: str | None) -> Known:
    """Returns the benchmarks of names and patterns, in `folder` and lm-eval.

    Raises UnknownTask for others.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not any(Path(folder).rglob("*.yaml")):
        raise ConfigError(f"task_folder {folder} must hold tasks of lm-eval (.yaml), got none; name another")
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not all(manager.match_tasks([name]) for name in names):
            manager = TaskManager(include_path=folder)  # takes seconds: there are more than ten thousand
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UnknownTask(
            "\n".join(f"unknown benchmark {name!r}{_near(name, manager.all_tasks)}" for name in unknown)
        )
    return Known(list(dict.fromkeys(n for name in names for n in manager.match_tasks([name]))), manager)


def _near(name: str, known: Sequence[str]) -> str:
    return suggest(name, known, listed=False) or "; lm-eval ls tasks lists all"


def ask(model: nn.Module, tokenizer: Tokenizer, known: Known, options: Options) -> list[Answered]:
    """Returns every figure of every benchmark for the model in its present state.

    Raises one DataError for all benchmarks without examples here.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet(), _own_draws(), _without_git():
        tasks = _loaded(known)
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch)
        try:
            found = lm_eval.simple_evaluate(
                model=asked,
                tasks=tasks,
                num_fewshot=options.shots,
                limit=options.examples,
                apply_chat_template=options.chat,
                task_manager=known.manager,
                bootstrap_iters=0,
            )
        except ValueError as e:  # a task that runs code, too long a prompt, a tokenizer without a template
            raise ConfigError(f"lm-eval refuses {', '.join(known.names)}: {e}") from e
    return list(_figures(found))


def _loaded(known: Known) -> list[Any]:
    tasks, problems = [], []
    for name in known.names:
        try:
            tasks += [*known.manager.load(name)["groups"].values()] or [
                *known.manager.load(name)["tasks"].values()
            ]
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as e:
            reason = (str(e).splitlines() or [""])[0][:200]
            problems.append(f"benchmark {name}: its examples are missing ({type(e).__name__}: {reason})")
    if problems:
        problems.append(
            "examples come from the Hugging Face hub or its cache; task_folder takes tasks with files of"
            " your own"
        )
        raise DataError("\n".join(problems))
    return tasks


def _figures(found: Mapping[str, Any]) -> Iterator[Answered]:
    for task, results in found["results"].items():
        examples = found["samples"].get(task, [])
        higher = found["higher_is_better"].get(task, {})
        for key, value in results.items():
            metric, comma, by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own = [e[metric] for e in examples if e["filter"] == by and metric in e]
            name = metric if by == "none" else f"{metric} ({by})"
            n = len(own) or int(results.get("sample_count", {}).get(key, results.get("sample_len", 0)))
            lower = higher.get(metric) is False
            yield Answered(task, n, Figure(name, float(value), "", lower, *_parts(own, float(value))))


def _parts(examples: Sequence[Any], value: float) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns parts and weights of the examples if their ratio is the value: a mean or bits per byte; else
    None."""
    try:
        pairs = [(-e[0] / math.log(2), e[1]) if isinstance(e, tuple) else (float(e), 1.0) for e in examples]
        found = torch.tensor(pairs, dtype=torch.float64)  # (n, 2)
    except (TypeError, ValueError, IndexError):  # details of a corpus-level measure
        return None, None
    if not len(found) or not math.isclose(
        float(found[:, 0].sum() / found[:, 1].sum()), value, rel_tol=1e-6, abs_tol=1e-9
    ):
        return None, None
    return found[:, 0], found[:, 1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block lm-eval logs errors only; its tables of defaults and settings are not the user's."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_git() -> Iterator[None]:
    """Within the block lm-eval does not ask git for the current commit: git warns in other folders."""
    from lm_eval import evaluator

    asking = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asking


@contextmanager
def _own_draws() -> Iterator[None]:
    """Within the block random numbers are the benchmarks' own; later draws of the process stay the same."""
    import numpy

    plain, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(numbers)
