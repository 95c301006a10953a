"""`veneer demo`: full fine-tuning, LoRA and LoRA+ on the built-in model, measured in what they learn and forget."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer import embedded, tasks
from veneer.adapt.attach import detach
from veneer.adapt.store import store
from veneer.adapt.switch import using
from veneer.analyse.page import demo_report
from veneer.analyse.page.demo_report import KNOWN, METRIC, TARGET
from veneer.analyse.page.plots import TITLES, learning_vs_forgetting
from veneer.analyse.page.run_report import REPORT
from veneer.data.reading import Reading
from veneer.data.spread import spread
from veneer.embedded.texts import DOMAINS, describe, domain, has, known
from veneer.errors import ConfigError, option
from veneer.models import machine, pretrained
from veneer.runs.dial import STRENGTHS, Point, dial, recommend
from veneer.runs.fit import fit
from veneer.runs.texts import sources, texts
from veneer.tasks.text.samples import continuation
from veneer.train.folder.layout import RESULTS, put
from veneer.train.folder.result import Result
from veneer.train.loop.progress import Notes, Voice
from veneer.train.run import Run
from veneer.units import size

NOISE = 0.03  # of the metric: above twice the largest deviation over seeds in bench/results/demo_rates.json
WINDOWS, LENGTH, BATCH = 24, 256, 4
DIALLED = {"valid": [s for s in STRENGTHS if s >= 0.5], "test": [s for s in STRENGTHS if s]}
PICTURE = "learning-vs-forgetting.png"
PROMPTS = {"prose": 'The "with" statement', "c": "PyAPI_FUNC("}


class Contender(NamedTuple):
    """One way to train. rates: the peak learning rate by target, chosen on validation text by bench/demo_rates.py."""

    method: str
    rates: Mapping[str, float]
    settings: Mapping[str, Any]


CONTENDERS = {
    "full": Contender("full", {"prose": 6e-4, "c": 6e-4}, {}),
    "lora": Contender("lora", {"prose": 5e-3, "c": 5e-3}, {"options": {"rank": 8}}),
    "loraplus": Contender(
        "lora", {"prose": 5e-4, "c": 1e-3}, {"options": {"rank": 8}, "optimiser": "loraplus"}
    ),
}


def demo(
    out: str = "runs/demo", *, steps: int = 100, seed: int = 0, fresh: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains every method on every text that this interpreter has, and writes results.json and a picture into `out`.

    out: folder of the demo; trainings that are finished there are not repeated, one that was stopped goes on
    steps: length of each training, 1,024 tokens a step
    seed: decides starts and order
    fresh: remove what an earlier demo left in `out` and begin anew
    """
    folder, voice = Path(out), Voice(progress)
    targets = [d for d in DOMAINS if has(d)]
    runs = {
        (t, label): settings(folder, t, label, c, steps=steps, seed=seed)
        for t in targets
        for label, c in CONTENDERS.items()
    }
    if fresh:
        _clear(folder)
    for missing in sorted(set(DOMAINS) - set(targets)):
        voice.say(f"this interpreter carries no text for {TITLES[missing]!r}; the demo goes on without it")
    judge = Judge(seed)
    rows: list[dict[str, Any]] = []
    for (target, label), run in runs.items():
        voice.say(f"{TITLES[label]} on {TITLES[target]} ({len(rows) + 1} of {len(runs)})")
        try:
            result = fit(run, progress=progress)
        except ConfigError as e:
            raise ConfigError(
                f"{e.text}\nor remove an earlier demo's files by {option('fresh', True)}"
            ) from e
        with voice.phase("measuring strengths"):
            rows.append(judge.row(target, label, result))
    results = {
        "methods": rows,
        f"noise_{METRIC.name}": NOISE,
        "steps": steps,
        "seed": seed,
        "texts": {t: {s: describe(domain(t, s)) for s in ("train", "valid", "test")} for t in targets}
        | {"known": describe(known("test"))},
        "versions": machine.versions(),
        "picture": PICTURE,
    }
    put(folder / RESULTS, results)
    learning_vs_forgetting(rows, folder / PICTURE, NOISE, METRIC)
    demo_report.write(folder)
    return results


def _clear(folder: Path) -> None:
    """Removes what a demo makes, and nothing else that may lie there."""
    for target in DOMAINS:
        for label in CONTENDERS:
            shutil.rmtree(folder / f"{target}-{label}", ignore_errors=True)
    for name in (RESULTS, PICTURE, REPORT):
        (folder / name).unlink(missing_ok=True)


def settings(
    folder: Path,
    target: str,
    label: str,
    contender: Contender,
    *,
    steps: int,
    seed: int,
    lr: float | None = None,
) -> Run:
    """The run of one contender on one target."""
    return Run(
        data=(f"{embedded.PREFIX}:{target}",),
        method=contender.method,
        lr=lr or contender.rates[target],
        steps=steps,
        batch=BATCH,
        length=LENGTH,
        eval_every=max(1, steps // 2),
        save_every=max(1, steps // 2),
        eval_windows=WINDOWS // 2,
        test=(f"{embedded.PREFIX}:{target}:valid",),  # the true test text is measured by the judge alone
        seed=seed,
        out=str(folder / f"{target}-{label}"),
        resume=True,
        report=False,  # the demo has a page of its own
        **contender.settings,
    )


class Judge:
    """Measures adapters on one base model: dials on validation text, reports on test text."""

    def __init__(self, seed: int) -> None:
        kind = tasks.get(tasks.DEFAULT)
        self.tokenizer = pretrained.processor(embedded.PREFIX, kind.PROCESSOR)
        self.task = tasks.build(tasks.DEFAULT, self.tokenizer, Reading(length=LENGTH))
        self.model = pretrained.model(embedded.PREFIX, kind.AUTO, torch.float32, torch.device("cpu"))
        self.seed = seed
        self.examples: dict[tuple[str, str], Sequence[Any]] = {}
        self.base: dict[tuple[str, str], list[Point]] = {}

    def row(self, target: str, label: str, result: Result) -> dict[str, Any]:
        """Returns the entry of one run for results.json."""
        store.load(self.model, result.adapter, "judged")
        try:
            chosen = recommend(self.points(target, "valid"), self.task.METRIC)
            points = self.points(target, "test")
            at = {p.strength: p for p in points}
            samples = {"before": self.sample(target, 0.0), "after": self.sample(target, 1.0)}
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
        """Returns the dial of the attached adapter on one split; the base's point is measured once."""
        text = {"target": self.text(target, split), "known": self.text("known", split)}
        if (target, split) not in self.base:
            self.base[target, split] = dial(self.model, "judged", self.task, text, strengths=[0.0])
        own = dial(self.model, "judged", self.task, text, strengths=DIALLED[split])
        return self.base[target, split] + own

    def text(self, name: str, split: str) -> Sequence[Any]:
        """Returns examples of one text, evenly spaced, fewer of validation text; reads it once."""
        if (name, split) not in self.examples:
            rows = sources.rows([f"{embedded.PREFIX}:{name}:{split}"], split)
            whole = texts.prepare(rows, self.task, Notes())
            n = WINDOWS if split == "test" else WINDOWS // 2
            self.examples[name, split] = spread(whole.examples, n)
        return self.examples[name, split]

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


def text(results: Mapping[str, Any]) -> str:
    """The results for people: a table, the dial, what is noise, samples, and the next command."""
    rows = results["methods"]
    parts = [
        table([r for r in rows if r["target"] == t], t, results[f"noise_{METRIC.name}"])
        for t in dict.fromkeys(r["target"] for r in rows)
    ]
    return "\n".join([*parts, _next(rows)])


def table(rows: Sequence[Mapping[str, Any]], target: str, noise: float) -> str:
    """One target's rows, its dial and its samples."""
    before = rows[0]
    lines = [
        f"\nLearning {TITLES[target]}: {METRIC.words} on text held out from training,"
        f" {before[f'{TARGET}_before']:.3f} before; on Python it knew, {before[f'{KNOWN}_before']:.3f} before",
        "",
        f"{'':<18}{'trained':>11}{'adapter':>11}{'learned':>16}{'forgotten':>16}{'seconds':>9}   dialled to (learned, forgotten)",
    ]
    lines += [_line(r) for r in rows]
    lines += [
        f"Differences below {noise} are noise at one seed: {_ties(rows, noise)}.",
        "",
        f"Prompt: {before['prompt']}",
    ]
    lora = next((r for r in rows if r["method"] == "lora"), before)
    lines += [
        f"  {name:<7} {_one_line(lora['samples'][key])}"
        for name, key in (("base", "before"), ("LoRA", "after"))
    ]
    return "\n".join(lines)


def _line(r: Mapping[str, Any]) -> str:
    """One run as a line of the table."""
    at = next(p for p in r["dial"] if p["strength"] == r["recommended_strength"])
    moves = [
        f"{r[f'{k}_after']:>8.3f} {r[f'{k}_after'] / r[f'{k}_before'] - 1:>+7.1%}" for k in (TARGET, KNOWN)
    ]
    sizes = f"{r['trainable_parameters']:>11,}{size(r['adapter_bytes']):>11}"
    dialled = f"{at['strength']:g} ({at[TARGET]:.3f}, {at[KNOWN]:.3f})"
    return f"{TITLES[r['method']]:<18}{sizes}{''.join(moves)}{r['seconds']:>9.0f}   {dialled}"


def _ties(rows: Sequence[Mapping[str, Any]], noise: float) -> str:
    close = []
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            same = [
                w
                for w, k in (("learned", f"{TARGET}_after"), ("forgotten", f"{KNOWN}_after"))
                if abs(a[k] - b[k]) < noise
            ]
            if same:
                close.append(
                    f"{TITLES[a['method']]} and {TITLES[b['method']]} are alike in {' and '.join(same)}"
                )
    return "; ".join(close) or "no two methods are alike"


def _next(rows: Sequence[Mapping[str, Any]]) -> str:
    lora = next((r for r in rows if r["method"] == "lora"), rows[0])
    folder = Path(lora["folder"])
    return (
        f"\nPicture: {folder.parent / PICTURE}    Numbers: {folder.parent / RESULTS}\n"
        f"Next: veneer generate --adapter {folder}@{lora['recommended_strength']:g} {PROMPTS[lora['target']]!r}\n"
        f"      veneer inspect {folder}\n"
        f"      veneer fit --model YOUR_MODEL --data YOUR.jsonl --out runs/yours"
    )


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())[:110]
