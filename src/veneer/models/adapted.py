"""Opens a base model with adapters as commands name them: FOLDER, NAME=FOLDER, FOLDER@STRENGTH."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.adapt.attach import detach
from veneer.adapt.hooks import NAME
from veneer.adapt.peft.settings import CONFIG as PEFT_CONFIG
from veneer.adapt.store import manifest, store
from veneer.adapt.store.folder import adapter_folder, holds_one
from veneer.adapt.switch import using
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, first_few, option
from veneer.files import read_json
from veneer.models import pretrained, vocabulary
from veneer.models.of_task import loaded_base
from veneer.sites import changed
from veneer.tasks import Task
from veneer.train.folder.layout import BASE, CONFIG, METRICS

TEMPLATE = "chat_template.jinja"  # as transformers saves it beside a tokenizer
SPEC = re.compile(r"(?:(?P<name>[^=@/]+)=)?(?P<folder>[^@]+?)(?:@(?P<strength>[-+.\de]+))?")
PLAIN = re.compile(r"(?P<folder>.+)(?P<name>)(?P<strength>)")  # a folder whose path has the marks of SPEC


class Wanted(NamedTuple):
    """One adapter of a command: its name, its folder (or its run's), its strength."""

    name: str
    folder: Path
    strength: float


class Opened(NamedTuple):
    """The base model in eval mode with all adapters attached, its tokenizer and its name."""

    model: nn.Module
    tokenizer: Tokenizer
    base: str


def parse(specs: Sequence[str]) -> list[Wanted]:
    """Returns the adapters that the words name. Raises ConfigError listing all bad ones."""
    found, problems = [], []
    for spec in specs:
        hit = PLAIN.fullmatch(spec) if Path(spec).is_dir() else SPEC.fullmatch(spec)
        try:
            strength = float(hit["strength"] or 1) if hit else 0.0
        except ValueError:
            hit = None
        if not hit:
            problems.append(
                f"adapter {spec!r}: write FOLDER, NAME=FOLDER or FOLDER@STRENGTH, such as runs/fit@0.75"
            )
            continue
        folder = Path(hit["folder"])
        name = hit["name"] or re.sub(r"[^A-Za-z0-9_-]", "-", folder.resolve().name)
        if not NAME.fullmatch(name):
            problems.append(
                f"adapter {spec!r}: {name!r} is not a valid name; put one of letters, digits, '-' and '_' "
                f"before it: NAME={spec}"
            )
        found.append(Wanted(name, folder, strength))
    twice = sorted({w.name for w in found if any(o.name == w.name and o.folder != w.folder for o in found)})
    if twice:
        problems.append(
            f"several adapters are called {first_few(twice)}; name them apart: first={found[0].folder}"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def summed(wanted: Sequence[Wanted]) -> dict[str, float]:
    """Returns the strength of every adapter for all acting together; repeated ones add up."""
    found: dict[str, float] = {}
    for w in wanted:
        found[w.name] = found.get(w.name, 0.0) + w.strength
    return found


def title(w: Wanted) -> str:
    """Returns an adapter's name for tables, with its strength unless that is 1."""
    return w.name if w.strength == 1 else f"{w.name} at {w.strength:g}"


def base_of(wanted: Sequence[Wanted]) -> str:
    """Returns the base model that the adapters' runs or files name.

    Raises ConfigError if they name none, or different ones.
    """
    bases = {w.folder: _base(w.folder) for w in wanted}
    silent = [str(f) for f, base in bases.items() if not base]
    if silent:
        raise ConfigError(f"{first_few(silent)} does not say which model it was made for; give --model")
    names = sorted({str(b) for b in bases.values()})
    if len(names) > 1:
        raise ConfigError(f"the adapters were made for different models: {first_few(names)}; give --model")
    return names[0]


def format_of(wanted: Sequence[Wanted], base: str) -> str | None:
    """Returns the format to quantise the plain base to, or None if it stays plain or `base` is a folder.

    Raises ConfigError if the adapters' bases have different forms, or one that only a folder holds.
    """
    held = changed.kind_of_folder(base)
    if held is not None and not held.whole:
        return None
    records = {w.folder: manifest.record_of(adapter_folder(w.folder)) for w in wanted}
    found = {f: changed.recorded(r["base"]) if r else {} for f, r in records.items()}
    forms = next(iter(found.values()), {})
    if any(other != forms for other in found.values()):
        told = first_few(f"{folder}: {changed.in_words(each)}" for folder, each in found.items())
        raise ConfigError(
            f"the adapters' bases have different forms ({told}); use the adapters one at a time"
        )
    formats = forms.get("quantised", [])
    if forms.keys() - {"quantised", held.name if held else "quantised"}:
        raise ConfigError(
            f"model: the adapters' base is {changed.in_words(forms)}, {base!r} is plain; give the base's"
            f" folder by {option('model')}"
        )
    return formats[0] if len(formats) == 1 else None


def _base(folder: Path) -> str | None:
    for run in (folder, folder.parent):
        if changed.kind_of_folder(run / BASE) is not None:
            return str(run / BASE)
        is_run = (run / CONFIG).is_file() and adapter_folder(run).is_dir()
        if is_run and "run" in (config := read_json(run / CONFIG)):
            return str(config["run"]["model"])
    settings = adapter_folder(folder) / PEFT_CONFIG
    return read_json(settings).get("base_model_name_or_path") if settings.is_file() else None


def there(specs: Sequence[str]) -> list[Wanted]:
    """Returns the adapters that the words name. Raises ConfigError listing those whose folder holds none."""
    wanted = parse(specs)
    check_there(w.folder for w in wanted)
    return wanted


def chat_template(folder: Path) -> str | None:
    """Returns the chat template saved with an adapter, or None."""
    path = adapter_folder(folder) / TEMPLATE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def check_there(folders: Iterable[Path]) -> None:
    """Raises ConfigError listing all folders without an adapter."""
    missing = {folder: problem for folder in folders if (problem := _missing(folder))}
    if missing:
        raise ConfigError("\n".join(f"adapter {folder}: {problem}" for folder, problem in missing.items()))


def _missing(folder: Path) -> str | None:
    """Returns the reason why the folder holds no adapter, with the place of one if known; else None."""
    if not folder.is_dir():
        return "the folder does not exist"
    if holds_one(adapter_folder(folder)):
        return None
    if (folder / CONFIG).is_file() and (folder / METRICS).is_file():
        return "the run there has not finished, and has no adapter yet; go on with it by veneer fit --resume"
    inside = sorted(str(p) for p in folder.iterdir() if p.is_dir() and holds_one(adapter_folder(p)))
    hint = f"; name one of {first_few(inside)}" if inside else f" ({PEFT_CONFIG}, {manifest.NAME})"
    return f"it holds no adapter{hint}"


@contextmanager
def alone(model: nn.Module, w: Wanted | None, allow: Sequence[str] = ()) -> Iterator[None]:
    """Within the block the adapter is on the model and acts alone, or no adapter acts.

    Adapters that exclude each other, such as a whole module beside low-rank ones, follow one another so.
    Raises what loading raises.
    """
    if w is not None:
        store.load(model, w.folder, w.name, allow=allow)
    try:
        with using(model, {} if w is None else {w.name: w.strength}):
            yield
    finally:
        if w is not None:
            detach(model, w.name)


def check(model: nn.Module, wanted: Sequence[Wanted], allow: Sequence[str] = ()) -> None:
    """Raises what loading raises for the first adapter that cannot be loaded, before any is used."""
    for w in {w.folder: w for w in wanted}.values():
        with alone(model, w, allow):
            pass


def open_all(
    specs: Sequence[str],
    *,
    model: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    allow: Sequence[str] = (),
) -> tuple[Opened, list[Wanted]]:
    """Returns the base with every adapter attached, and the adapters. Raises what loading raises."""
    wanted = there(specs)
    opened = open_base(model or base_of(wanted), wanted, dtype, device)
    for w in {w.name: w for w in wanted}.values():  # one adapter may be wanted at several strengths
        store.load(opened.model, w.folder, w.name, allow=allow)
    return opened, wanted


def open_base(
    base: str,
    wanted: Sequence[Wanted],
    dtype: torch.dtype,
    device: str,
    task: Task | None = None,
    *,
    stream: bool = False,
) -> Opened:
    """Returns the base alone, in the quantised form that these adapters were trained on; see loaded_base."""
    read = task.processor if task else processor(base, wanted)
    model = loaded_base(base, task, dtype, torch.device(device), format_of(wanted, base), stream=stream)
    return Opened(vocabulary.grown(model, [w.folder for w in wanted], read), read, base)


def processor(base: str, wanted: Sequence[Wanted], kind: str = pretrained.TOKENIZER) -> Any:
    """Returns the base's processor, with the new tokens and the chat template of the adapters.

    Raises ConfigError for adapters of different new tokens; of different templates none is taken.
    """
    found = pretrained.processor(base, kind)
    if kind == pretrained.TOKENIZER:
        found = vocabulary.tokenizer_of(found, [w.folder for w in wanted])
    templates = {chat_template(w.folder) for w in wanted} - {None}
    if len(templates) == 1:
        found.chat_template = templates.pop()
    return found
