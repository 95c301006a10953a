"""Knows the optional packages, the features that need them, and whether each can be used."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple


class Package(NamedTuple):
    """A package as pip names it, the module it brings, and the oldest version that will do."""

    name: str
    module: str
    least: str


class Feature(NamedTuple):
    """Packages that a feature needs; extra: the extra of Veneer that brings them, or ""."""

    name: str
    extra: str
    packages: tuple[Package, ...]


MODULES = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "ray[serve,train]": "ray",
    "mlflow-skinny": "mlflow",
    "sse-starlette": "sse_starlette",
    "prometheus-client": "prometheus_client",
}  # modules named unlike their package


def feature(name: str, extra: str, packages: Mapping[str, str]) -> Feature:
    """Returns the feature; packages: the oldest versions by name."""
    needed = (Package(package, MODULES.get(package, package), least) for package, least in packages.items())
    return Feature(name, extra, tuple(needed))


FEATURES = (
    feature("adapting models", "", {"torch": "2.6", "safetensors": "0.4.3"}),
    feature("language models and texts", "text", {"transformers": "5.0", "tokenizers": "0.22"}),
    feature("command line", "cli", {"typer": "0.28", "rich": "13.7", "pyyaml": "6.0"}),
    feature("pictures of reports", "plots", {"matplotlib": "3.8"}),
    feature("parquet, arrow and datasets", "data", {"datasets": "3.0", "pyarrow": "15.0"}),
    feature(
        "figures of tasks",
        "metrics",
        {"scikit-learn": "1.4", "scipy": "1.11", "sacrebleu": "2.4", "rouge_score": "0.1.2"},
    ),
    feature("compress", "compress", {"scipy": "1.11"}),
    feature("compare, study", "compare", {"optuna": "4.4"}),
    feature("pictures as data", "images", {"pillow": "10.0"}),
    feature("task text-to-image", "diffusion", {"diffusers": "0.35"}),
    feature("files of GGUF", "gguf", {"gguf": "0.17"}),
    feature("other types of PEFT's adapters", "peft", {"peft": "0.21"}),
    feature("--engine ray, replicas", "ray", {"ray[serve,train]": "2.51", "httpx": "0.27"}),
    feature(
        "serve",
        "serve",
        {"fastapi": "0.115", "uvicorn": "0.30", "sse-starlette": "2.1", "prometheus-client": "0.20"},
    ),
    feature("eval --tasks", "eval", {"lm_eval": "0.4.11"}),
    feature("--track tensorboard", "tensorboard", {"tensorboard": "2.16"}),
    feature("--track wandb", "wandb", {"wandb": "0.20"}),
    feature("--track mlflow", "mlflow", {"mlflow-skinny": "3.10", "sqlalchemy": "2.0", "alembic": "1.13"}),
    feature("--track trackio", "trackio", {"trackio": "0.43"}),
)
# Packages whose layers can be adapted in a model that has them; no extra of Veneer installs them.
LAYERS_OF = {"bitsandbytes": "its quantised layers", "torchao": "its quantised layers"}


def problem_of(package: Package) -> str:
    """Returns the reason why the package cannot be used, or ""."""
    there = version_of(package.name)
    if there is None:
        return "missing"
    if numbers(there) < numbers(package.least):
        return f"{there} is older than {package.least}"
    try:
        importlib.import_module(package.module)
    except Exception as e:  # whatever a broken installation raises
        return f"{there} cannot be imported: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return ""


def version_of(name: str) -> str | None:
    """Returns the installed version of a package, or None."""
    try:
        return version(name.partition("[")[0])
    except PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Returns (2, 13, 0) for "2.13.0+cpu"."""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[^\d.]", text)[0]))
