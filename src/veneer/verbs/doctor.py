"""`doctor`: what this installation and this machine have, what is missing for which feature, and the command that brings it."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from veneer import embedded
from veneer.adapt.store import fingerprint
from veneer.analyse.cost import process_memory
from veneer.embedded import texts
from veneer.errors import VeneerError
from veneer.models import pretrained
from veneer.ops.matrix.linalg import multiplies_bf16
from veneer.units import size
from veneer.version import __version__

PYTHON = (3, 10)


class Package(NamedTuple):
    """A package as pip names it, the module it brings, and the oldest version that will do."""

    name: str
    module: str
    least: str


class Feature(NamedTuple):
    """What packages make possible; extra: of Veneer that brings them, "" for those that come with it."""

    what: str
    extra: str
    packages: tuple[Package, ...]


MODULES = {"pyyaml": "yaml", "mlflow-skinny": "mlflow"}  # those that are called otherwise than their package


def _feature(what: str, extra: str, packages: Mapping[str, str]) -> Feature:
    """packages: the oldest version by name."""
    return Feature(
        what, extra, tuple(Package(name, MODULES.get(name, name), least) for name, least in packages.items())
    )


FEATURES = (
    _feature("adapting models", "", {"torch": "2.6", "safetensors": "0.4.3"}),
    _feature("language models and texts", "text", {"transformers": "5.0", "tokenizers": "0.22"}),
    _feature("command line", "cli", {"typer": "0.28", "rich": "13.7", "pyyaml": "6.0"}),
    _feature("pictures of reports", "plots", {"matplotlib": "3.8"}),
    _feature("parquet, arrow and datasets", "data", {"datasets": "3.0", "pyarrow": "15.0"}),
    _feature("eval --tasks", "eval", {"lm_eval": "0.4.11"}),
    _feature("--track tensorboard", "tensorboard", {"tensorboard": "2.16"}),
    _feature("--track wandb", "wandb", {"wandb": "0.20"}),
    _feature("--track mlflow", "mlflow", {"mlflow-skinny": "3.10", "sqlalchemy": "2.0", "alembic": "1.13"}),
    _feature("--track trackio", "trackio", {"trackio": "0.43"}),
)
# Packages whose layers are adapted where a model brings them; no extra of Veneer does.
LAYERS_OF = {"bitsandbytes": "its quantised layers", "torchao": "its quantised layers"}


class Check(NamedTuple):
    """One look at something. fine: whether it is there and works; core: whether the main job needs it; cure: what would do."""

    name: str
    fine: bool
    found: str
    cure: str = ""
    core: bool = False


class Examination(NamedTuple):
    """Everything that was looked at."""

    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether nothing that the core needs is broken."""
        return all(c.fine for c in self.checks if c.core)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"healthy": self.healthy, "checks": [c._asdict() for c in self.checks]}


def doctor() -> Examination:
    """A look at the versions, the optional packages, the devices, the built-in texts and the built-in model."""
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _packages,
        _layers,
        _devices,
        _compiler,
        _texts,
        _model,
    )
    return Examination([check for look in looks for check in look()])


def _python() -> Iterator[Check]:
    yield Check("veneer", True, __version__, core=True)
    least = ".".join(map(str, PYTHON))
    yield Check(
        "python",
        sys.version_info >= PYTHON,
        platform.python_version(),
        f"install Python {least} or newer",
        core=True,
    )


def _packages() -> Iterator[Check]:
    for feature in FEATURES:
        for package in feature.packages:
            problem = _problem(package)
            pip = (
                f"pip install 'veneer[{feature.extra}]'"
                if feature.extra
                else f"pip install '{package.name}>={package.least}'"
            )
            found = f"{problem or _version(package.name)} ({feature.what})"
            yield Check(package.name, not problem, found, pip if problem else "", core=not feature.extra)


def _layers() -> Iterator[Check]:
    for name, what in LAYERS_OF.items():
        problem = _problem(Package(name, name, "0"))
        cure = f"pip install {name}, for a base in its format; --quantise needs none" if problem else ""
        yield Check(name, not problem, f"{problem or _version(name)} ({what})", cure)


def _problem(package: Package) -> str:
    """Why the package cannot be used, or nothing."""
    there = _version(package.name)
    if there is None:
        return "missing"
    if numbers(there) < numbers(package.least):
        return f"{there} is older than {package.least}"
    try:
        importlib.import_module(package.module)
    except Exception as e:  # whatever a broken installation raises
        return f"{there} cannot be imported: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))


def _devices() -> Iterator[Check]:
    places = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for place in places:
        room = process_memory.available(place)
        memory = "memory not known" if room is None else f"{size(room)} of memory available"
        n = torch.get_num_threads()
        name = f"{n} thread{'s' * (n > 1)}" if place.type == "cpu" else torch.cuda.get_device_name(place)
        bf16 = (
            "bf16 products in hardware"
            if multiplies_bf16(place)
            else "no bf16 products in hardware: precision auto is fp32"
        )
        yield Check(str(place), True, f"{name}, {memory}, {bf16}", core=place.type == "cpu")


def _compiler() -> Iterator[Check]:
    names = [n for n in (sysconfig.get_config_var("CXX") or "", "g++", "clang++", "cl") if n]
    found = next((path for n in names if (path := shutil.which(n.split()[0]))), None)
    yield Check(
        "C++ compiler",
        found is not None,
        f"{found or 'missing'} (torch.compile on the CPU)",
        "" if found else "apt install g++",
    )


def _texts() -> Iterator[Check]:
    for name, what in {"prose": "built-in prose", "c": "built-in C headers"}.items():
        there = texts.has(name)
        cure = "" if there else _CURES[name]
        yield Check(
            what, there, f"{'carried by' if there else 'missing from'} this interpreter (veneer demo)", cure
        )
    try:
        n = len(texts.known("test"))
    except texts.TextMissing as e:
        yield Check("built-in known text", False, str(e), "install Python with its library as source")
    else:
        yield Check("built-in known text", True, f"{n} modules of the library (what is forgotten)")


_CURES = {
    "prose": "install Python's pydoc_data (Debian: apt install libpython3-stdlib)",
    "c": "apt install python3-dev",
}


def _model() -> Iterator[Check]:
    if _version("transformers") is None:
        yield Check(
            "built-in model", False, "cannot be looked at without transformers", "pip install 'veneer[text]'"
        )
        return
    try:
        folder = embedded.folder()
        sha256 = fingerprint.measure(
            pretrained.causal_lm(embedded.PREFIX, torch.float32, torch.device("cpu"))
        )["sha256"]
    except VeneerError as e:
        yield Check("built-in model", False, str(e), "pip install --force-reinstall --no-deps veneer")
    except Exception as e:  # a damaged file may raise anything
        yield Check(
            "built-in model",
            False,
            f"{type(e).__name__}: {e}",
            "pip install --force-reinstall --no-deps veneer",
            core=True,
        )
    else:
        yield Check("built-in model", True, f"{folder}, fingerprint {sha256[:12]}", core=True)


def text(found: Examination) -> str:
    """The examination for people."""
    lines = []
    for c in found.checks:
        lines.append(f"{'ok ' if c.fine else 'NO ' if c.core else 'no '} {c.name:<20} {c.found}")
        lines += [f"    {'':<20} -> {c.cure}"] if c.cure and not c.fine else []
    return "\n".join(
        [
            *lines,
            "",
            "the core works" if found.healthy else "something that the core needs is broken, see NO above",
        ]
    )


def exit_code(found: Examination) -> int:
    """Returns 0 if the core works, else 3."""
    return 0 if found.healthy else 3
