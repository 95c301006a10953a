"""Checks that an adapter is complete, belongs to a base, loads there and has an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer import dtypes
from veneer.adapt import attach, attached, probe
from veneer.adapt.peft import reading, settings
from veneer.adapt.store import manifest, store
from veneer.adapt.store.folder import adapter_folder
from veneer.adapt.store.problems import ALLOW
from veneer.adapt.store.sizes import size
from veneer.errors import FormatError, first_few
from veneer.files import read_json
from veneer.models import adapted, pretrained, vocabulary

NAME = "being-verified"
# Problems that `store.load` refuses, by the word that lets each through, and the text of a passed check.
LOADING = {
    "sha256": "the tensors are those that were saved",
    "unused": "every tensor belongs to a layer",
    "base": "the base is the one that it was made for",
    "finite": "all numbers are finite",
    "zero": "every layer changes something",
    "norm": "every change has the size that it was saved with",
    "probe": "the outputs are those that were kept with it",
}
WITH_MANIFEST = ("sha256", "base", "norm", "probe")


class Check(NamedTuple):
    """One check. passed: None if it was impossible; text: the finding, or the reason."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Report:
    """All checks of an adapter. layers: the layers that it changes; dead: those whose change is zero."""

    adapter: str
    checks: list[Check]
    layers: list[str]
    dead: list[str]

    @property
    def good(self) -> bool:
        """Returns False if a check failed; the command line then exits with 3."""
        return all(c.passed is not False for c in self.checks)

    def as_dict(self) -> dict[str, Any]:
        checks = [c._asdict() for c in self.checks]
        return {
            "adapter": self.adapter,
            "good": self.good,
            "checks": checks,
            "layers": self.layers,
            "dead": self.dead,
        }


def verify(adapter: str, *, model: str | None = None, dtype: str = "float32", device: str = "cpu") -> Report:
    """Loads the adapter on its base and returns checks of its completeness, its base and its effect.

    adapter: folder of the adapter, or of the run that trained it
    model: base model [the one that the adapter names]
    dtype: number format of the base: fp32, bf16 or fp16
    device: device to compute on: cpu, cuda, ..
    """
    folder = Path(adapter)
    number_format = dtypes.of_name(dtype)
    adapted.check_there([folder])
    wanted = [adapted.Wanted(NAME, folder, 1.0)]
    base = model or adapted.base_of(wanted)
    found = pretrained.causal_lm(base, number_format, torch.device(device), adapted.format_of(wanted, base))
    return examine(vocabulary.grown(found, [folder]), adapter_folder(folder))


def examine(model: nn.Module, folder: str | Path, *, inputs: Mapping[str, Any] | None = None) -> Report:
    """Returns the report on the adapter in `folder` and a loaded base, which stays unchanged.

    inputs: keyword arguments of one call of the model, for models that are not of language.
    """
    folder = Path(folder)
    words = ("fit", *LOADING)
    whole = _refused(model, folder, set()) is None
    wrong = {word: None if whole else _refused(model, folder, set(ALLOW) - {word}) for word in words}
    checks = [
        Check(
            "complete",
            wrong["fit"] is None,
            wrong["fit"] or "every layer that it names is there, with all its tensors",
        )
    ]
    checks += _targets(model, folder)
    if wrong["fit"] is not None:
        return Report(str(folder), checks, [], [])
    silent = _no_manifest(folder)
    for word, good in LOADING.items():
        if wrong[word] is None and silent.get(word):
            checks.append(Check(word, None, silent[word]))
        else:
            checks.append(Check(word, wrong[word] is None, wrong[word] or good))
    store.load(model, folder, NAME, allow=tuple(ALLOW))
    try:
        sizes = {site.name: size(site, delta) for site, delta in attached.changes(model, NAME)}
        checks.append(_effect(model, inputs))
    finally:
        attach.detach(model, NAME)
    return Report(str(folder), checks, list(sizes), [n for n, s in sizes.items() if s.zero])


def _refused(model: nn.Module, folder: Path, allow: set[str]) -> str | None:
    """Returns the problem, on one line, that loading finds beside those of `allow`, or None."""
    try:
        store.load(model, folder, NAME, allow=tuple(allow))
    except FormatError as e:
        lines = [line.removeprefix("- ") for line in str(e).splitlines() if not line.startswith("to go on")]
        return "; ".join(lines[1:] or lines)
    attach.detach(model, NAME)
    return None


def _targets(model: nn.Module, folder: Path) -> Iterator[Check]:
    """Checks that each entry of target_modules is a layer of the model: PEFT skips missing ones silently."""
    path = folder / settings.CONFIG
    config = read_json(path) if path.is_file() else {}
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    idle = reading.idle_targets(config, [n for n, _ in model.named_modules()])
    text = (
        f"no layer is called {first_few(idle)}"
        if idle
        else f"each of {first_few(targets)} is a layer of the base"
    )
    yield Check("targets", not idle, text)


def _no_manifest(folder: Path) -> dict[str, str]:
    """Returns the reasons why checks are impossible, by word."""
    record = manifest.record_of(folder)
    if record is None:
        return dict.fromkeys(
            WITH_MANIFEST, f"another program wrote the folder: it has no {manifest.NAME} to compare with"
        )
    return (
        {} if record["probe"] else {"probe": f"none was kept: {record.get('no_probe') or 'no reason given'}"}
    )


def _effect(model: nn.Module, inputs: Mapping[str, Any] | None) -> Check:
    """Checks that the outputs on a probe differ with the adapter on and off, and measures how much."""
    taken = probe.take(model, NAME, inputs)
    if isinstance(taken, str):
        return Check("effect", False if "finite" in taken else None, taken)
    off, on = (probe.through(model, NAME)(taken["inputs"], on) for on in (False, True))
    change, largest = float((on - off).abs().max()), float(off.abs().max())
    if change == 0:
        return Check("effect", False, "the outputs with it are those of the base, bit for bit")
    flips = float((on.argmax(-1) != off.argmax(-1)).float().mean())
    moved = f"the outputs move by up to {change:.3g}, the largest is {largest:.3g}"
    return Check("effect", True, f"{moved}; {flips:.0%} of the first choices change")


def text(report: Report) -> str:
    """Returns the report for people, a check a line."""
    words = {True: "yes", False: "NO", None: "?"}
    lines = [f"{words[c.passed]:<4} {c.name:<9} {c.text}" for c in report.checks]
    if report.dead:
        lines.append(f"dead layers: {first_few(report.dead, 20)}")
    verdict = "verified" if report.good else "NOT what it should be"
    return "\n".join([*lines, f"{report.adapter}: {verdict}, {len(report.layers)} layers"])


def exit_code(report: Report) -> int:
    """Returns 0, or 3 if a check failed."""
    return 0 if report.good else 3
