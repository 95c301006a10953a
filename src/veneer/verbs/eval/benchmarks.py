"""Benchmarks of lm-eval: found by name, or refused with the nearest one, and asked of a model that is in memory."""

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

from veneer.errors import ConfigError, DataError, suggest


class UnknownTask(ConfigError):
    """A benchmark that was asked for does not exist: nothing was measured."""

    exit_code = 3


class Known(NamedTuple):
    """Names of tasks, groups and tags, and lm-eval's manager that has them."""

    names: list[str]
    manager: Any


class Options(NamedTuple):
    """shots: None for the task's own number; examples: None for all."""

    shots: int | None
    chat: bool
    examples: int | None
    batch: int


class Figure(NamedTuple):
    """A measure of a task over n examples, which is sum(parts) / sum(weights) over them; both None where it is not."""

    task: str
    metric: str
    lower_is_better: bool
    value: float
    n: int
    parts: Tensor | None
    weights: Tensor | None


def find(names: Sequence[str], folder: str | None) -> Known:
    """What the names and patterns stand for, in `folder` and among lm-eval's own. Raises UnknownTask for all that are neither."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not any(Path(folder).rglob("*.yaml")):
        raise ConfigError(f"task_folder {folder} holds no tasks (.yaml); name a folder with lm-eval's files")
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not all(manager.match_tasks([name]) for name in names):
            manager = TaskManager(include_path=folder)  # takes seconds: there are more than ten thousand
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UnknownTask(
            "\n".join(f"there is no benchmark {name!r}{_near(name, manager.all_tasks)}" for name in unknown)
        )
    return Known(list(dict.fromkeys(n for name in names for n in manager.match_tasks([name]))), manager)


def _near(name: str, known: Sequence[str]) -> str:
    return suggest(name, known, listed=False) or "; lm-eval ls tasks shows all that there are"


def ask(model: nn.Module, tokenizer: Any, known: Known, options: Options) -> list[Figure]:
    """Every measure of every task for the model as it is. Raises one DataError for all tasks whose examples cannot be had."""
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
        except (
            ValueError
        ) as e:  # a task that runs code, a prompt beyond the context, a tokenizer without a template
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
            problems.append(f"benchmark {name}: its examples could not be had ({type(e).__name__}: {reason})")
    if problems:
        problems.append(
            "examples come from the Hugging Face hub or its cache; task_folder takes tasks with files of your own"
        )
        raise DataError("\n".join(problems))
    return tasks


def _figures(found: Mapping[str, Any]) -> Iterator[Figure]:
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
            yield Figure(task, name, higher.get(metric) is False, float(value), n, *_parts(own, float(value)))


def _parts(examples: Sequence[Any], value: float) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Amounts and weights of the examples whose ratio is the value: a mean, or bits per byte. None where it is neither."""
    try:
        pairs = [(-e[0] / math.log(2), e[1]) if isinstance(e, tuple) else (float(e), 1.0) for e in examples]
        found = torch.tensor(pairs, dtype=torch.float64)  # (n, 2)
    except (TypeError, ValueError, IndexError):  # what a corpus measure keeps of an example
        return None, None
    if not len(found) or not math.isclose(
        float(found[:, 0].sum() / found[:, 1].sum()), value, rel_tol=1e-6, abs_tol=1e-9
    ):
        return None, None
    return found[:, 0], found[:, 1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block lm-eval tells errors only; its tables of defaults and settings are not the user's."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_git() -> Iterator[None]:
    """Within the block lm-eval does not ask git which commit of the current folder this is: git would complain of other folders."""
    from lm_eval import evaluator

    asking = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asking


@contextmanager
def _own_draws() -> Iterator[None]:
    """Within the block random numbers are the benchmarks' own; what the process draws later is untouched by them."""
    import numpy

    plain, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(plain)
        numpy.random.set_state(numbers)
