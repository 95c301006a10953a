"""Examines machine and installation: missing packages by feature, with the commands that install them."""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
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
from veneer.verbs.installed import FEATURES, LAYERS_OF, Package, problem_of, version_of
from veneer.version import __version__

PYTHON = (3, 10)


class Check(NamedTuple):
    """One finding. fine: present and working; core: needed for the main job; cure: the remedy."""

    name: str
    fine: bool
    found: str
    cure: str = ""
    core: bool = False


class Examination(NamedTuple):
    """All findings."""

    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Returns True if everything works that the core needs."""
        return all(c.fine for c in self.checks if c.core)

    def as_dict(self) -> dict[str, Any]:
        """Returns the findings, ready for JSON."""
        return {"healthy": self.healthy, "checks": [c._asdict() for c in self.checks]}


def doctor() -> Examination:
    """Examines versions, optional packages, devices, the built-in texts and the built-in model."""
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
            problem = problem_of(package)
            pip = (
                f"pip install 'veneer[{feature.extra}]'"
                if feature.extra
                else f"pip install '{package.name}>={package.least}'"
            )
            found = f"{problem or version_of(package.name)} ({feature.name})"
            yield Check(package.name, not problem, found, pip if problem else "", core=not feature.extra)


def _layers() -> Iterator[Check]:
    for name, what in LAYERS_OF.items():
        problem = problem_of(Package(name, name, "0"))
        cure = f"pip install {name}, for a base in its format; --quantise works without" if problem else ""
        yield Check(name, not problem, f"{problem or version_of(name)} ({what})", cure)


def _devices() -> Iterator[Check]:
    places = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for place in places:
        room = process_memory.available(place)
        memory = "memory unknown" if room is None else f"{size(room)} of memory available"
        n = torch.get_num_threads()
        name = f"{n} thread{'s' * (n > 1)}" if place.type == "cpu" else torch.cuda.get_device_name(place)
        bf16 = (
            "bf16 products in hardware"
            if multiplies_bf16(place)
            else "bf16 products not in hardware: --precision auto is fp32"
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
        yield Check("built-in known text", True, f"{n} modules of the library (to measure forgetting)")


_CURES = {
    "prose": "install Python's pydoc_data (Debian: apt install libpython3-stdlib)",
    "c": "apt install python3-dev",
}


def _model() -> Iterator[Check]:
    if version_of("transformers") is None:
        yield Check(
            "built-in model", False, "not examined: transformers is missing", "pip install 'veneer[text]'"
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
    """Returns the findings for people."""
    lines = []
    for c in found.checks:
        lines.append(f"{'ok ' if c.fine else 'NO ' if c.core else 'no '} {c.name:<20} {c.found}")
        lines += [f"    {'':<20} -> {c.cure}"] if c.cure and not c.fine else []
    verdict = "the core works" if found.healthy else "the core is broken, see NO above"
    return "\n".join([*lines, "", verdict])


def exit_code(found: Examination) -> int:
    """Returns 0 if the core works, else 3."""
    return 0 if found.healthy else 3
