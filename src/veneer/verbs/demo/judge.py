"""Measures the demo's adapters on one base: chooses strengths on validation text, reports on test text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from veneer import embedded, tasks
from veneer.adapt.attach import detach
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.data.reading import Reading
from veneer.data.spread import spread
from veneer.models import pretrained
from veneer.runs.dial import STRENGTHS, Point, dial, recommend
from veneer.runs.texts import sources, texts
from veneer.tasks.text.samples import continuation
from veneer.train.folder.result import Result
from veneer.train.loop.progress import Notes
from veneer.verbs.demo.contenders import LENGTH, WINDOWS

DIALLED = {"valid": [s for s in STRENGTHS if s >= 0.5], "test": [s for s in STRENGTHS if s]}
PROMPTS = {"prose": 'The "with" statement', "c": "PyAPI_FUNC("}


class Judge:
    """Measures adapters on one base model: dials on validation text, reports on test text."""

    def __init__(self, seed: int) -> None:
        kind = tasks.get(tasks.DEFAULT)
        self.tokenizer = pretrained.processor(embedded.PREFIX, kind.PROCESSOR)
        self.task = tasks.build(tasks.DEFAULT, self.tokenizer, Reading(length=LENGTH))
        self.model = pretrained.model(embedded.PREFIX, kind.AUTO, torch.float32, torch.device("cpu"))
        self.seed = seed
        self.examples: dict[tuple[str, str], Sequence[Any]] = {}
        self.base: dict[tuple[str, str], float] = {}
        self.begun: dict[str, str] = {}  # prompts continued by the base

    def row(self, target: str, label: str, result: Result) -> dict[str, Any]:
        """Returns the entry of one run for results.json."""
        store.load(self.model, result.adapter, "judged")
        try:
            chosen = recommend(self.points(target, "valid"), self.task.METRIC)
            points = self.points(target, "test")
            at = {p.strength: p for p in points}
            samples = {"before": self.before(target), "after": self.sample(target, 1.0)}
        finally:
            detach(self.model)
        return {
            "method": label,
            "target": target,
            **{f"{key}_before": value for key, value in self.named(at[0.0]).items()},
            **{f"{key}_after": value for key, value in self.named(at[1.0]).items()},
            "recommended_strength": chosen,
            "dial": [p.as_dict(self.task.METRIC) for p in points],
            "prompt": PROMPTS[target],
            "samples": samples,
            **{k: result.metrics[k] for k in ("trainable_parameters", "adapter_bytes", "seconds", "lr")},
            "folder": str(result.folder),
        }

    def named(self, point: Point) -> dict[str, float | None]:
        """Returns the figures of a point by name, without its strength."""
        return {k: v for k, v in point.as_dict(self.task.METRIC).items() if k != "strength"}

    def points(self, target: str, split: str) -> list[Point]:
        """Returns the dial of the attached adapter on one split."""
        text = {"target": self.text(target, split), "known": self.text("known", split)}
        base = Point(0.0, *(self.of_base(name, split) for name in (target, "known")))
        return [base, *dial(self.model, "judged", self.task, text, strengths=DIALLED[split])]

    def of_base(self, name: str, split: str) -> float:
        """Returns the base's metric on one text; measures it once."""
        if (name, split) not in self.base:
            with using(self.model):
                found = self.task.measure(self.model, self.text(name, split), batch=8)[0]
            self.base[name, split] = found.value
        return self.base[name, split]

    def text(self, name: str, split: str) -> Sequence[Any]:
        """Returns examples of one text, evenly spaced, fewer of validation text; reads it once."""
        if (name, split) not in self.examples:
            rows = sources.rows([f"{embedded.PREFIX}:{name}:{split}"], split)
            whole = texts.prepare(rows, self.task, Notes())
            n = WINDOWS if split == "test" else WINDOWS // 2
            self.examples[name, split] = spread(whole.examples, n)
        return self.examples[name, split]

    def before(self, target: str) -> str:
        """Returns the target's prompt continued by the base; writes it once."""
        if target not in self.begun:
            self.begun[target] = self.sample(target, 0.0)
        return self.begun[target]

    def sample(self, target: str, strength: float) -> str:
        """Returns the target's prompt continued at a strength of the attached adapter."""
        with using(self.model, *([{"judged": strength}] if strength else [])):
            return continuation(
                self.model,
                self.tokenizer,
                PROMPTS[target],
                seed=self.seed,
                temperature=0.7,
                max_new_tokens=48,
            )
