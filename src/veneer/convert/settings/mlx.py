"""mlx-lm's YAML, and the adapter_config.json that it leaves: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import execution
from veneer.convert.settings.given import Given, Translation, without_nothing
from veneer.errors import ConfigError

SIGNS = ("fine_tune_type", "num_layers", "iters", "lora_parameters", "adapter_path", "mask_prompt")
DEFAULTS: dict[str, Any] = {
    "model": "Qwen/Qwen3-0.6b",
    "fine_tune_type": "lora",
    "optimizer": "adam",
    "data": "mlx-community/WikiSQL",
    "seed": 0,
    "num_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "learning_rate": 1e-5,
    "steps_per_eval": 200,
    "adapter_path": "adapters",
    "save_every": 100,
    "max_seq_length": 2048,
    "grad_accumulation_steps": 1,
    "lora_parameters.rank": 8,
    "lora_parameters.scale": 20.0,
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "train": (True,),
    "test": (True, False),
    "test_batches": (500, -1),
    "val_batches": (25,),
    "steps_per_report": (10,),
    "trust_remote_code": (False,),
    "clear_cache_threshold": (0,),
    "config": (),
}
ELSEWHERE = {
    "num_layers": "which layers are the last ones depends on the model; choose them by an expression in to=",
    "resume_adapter_file": "a training starts with a fresh adapter here",
    "config": "the file itself",
    "val_batches": "set eval_windows",
}
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def translate(values: Mapping[str, Any], folder: Path = Path(), layers: int | None = None) -> Translation:
    """Our settings for an mlx-lm file. layers: of the base model, by which "the last 16" become an expression.

    Raises ConfigError for a fine_tune_type that mlx-lm does not have.
    """
    given, out = Given(values, DEFAULTS), Translation("mlx")
    kind = given.take("fine_tune_type")
    if kind not in ("lora", "dora", "full"):
        raise ConfigError(f"mlx-lm has no fine_tune_type {kind!r}; it has lora, dora and full")
    accumulate = int(given.take("grad_accumulation_steps"))
    steps = max(1, int(given.take("iters")) // accumulate)
    out.settings |= {
        "model": given.take("model"),
        "out": given.take("adapter_path"),
        "method": kind,
        "batch": given.take("batch_size"),
        "accumulate": accumulate,
        "steps": steps,
        "length": given.take("max_seq_length"),
        "packing": False,
        "train_on": "completion" if given.take("mask_prompt") else "all",
        "clip": 0.0,
        "seed": given.take("seed"),
        "eval_every": max(1, int(given.take("steps_per_eval")) // accumulate),
        "save_every": max(1, int(given.take("save_every")) // accumulate),
    }
    _data(given, out, folder)
    _targets(given, out, kind, layers)
    _optimiser(given, out, steps)
    execution.recomputed(given, out, "grad_checkpoint")
    execution.tracked(given, out, "report_to")
    for key, why in {**dict.fromkeys(HARMLESS, "not done here"), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()) + ((-1,) if key == "num_layers" else ()))
    out.uncarried += given.uncarried()
    return out


def _data(given: Given, out: Translation, folder: Path) -> None:
    """A folder's train.jsonl, valid.jsonl and test.jsonl, as far as they are there; else the name of a dataset."""
    name = str(given.take("data"))
    where = folder / name
    if not where.is_dir():
        out.settings["data"] = (name,)
        return
    for part, ours in (("train", "data"), ("valid", "valid"), ("test", "test")):
        if (where / f"{part}.jsonl").is_file():
            out.settings[ours] = (str(where / f"{part}.jsonl"),)


def _targets(given: Given, out: Translation, kind: str, layers: int | None) -> None:
    """Their scale acts as it is: alpha = scale * rank. Layers are counted from the last."""
    rank, scale, dropout = (given.take(f"lora_parameters.{k}") for k in ("rank", "scale", "dropout"))
    keys, number = given.take("lora_parameters.keys"), int(given.take("num_layers"))
    if kind == "full":
        return
    out.settings["options"] = without_nothing(
        {"rank": rank, "alpha": float(scale) * rank, "dropout": dropout}
    )
    if layers is not None and 0 <= number < layers:
        inner = "|".join(k.replace(".", r"\.") for k in keys) if keys else r".*"
        wanted = "|".join(map(str, range(layers - number, layers)))
        out.settings["to"] = rf".*\.({wanted})\.({inner})"
        given.values.pop("num_layers", None)
        given.defaults = {k: v for k, v in given.defaults.items() if k != "num_layers"}
    elif keys:
        out.settings["to"] = tuple(keys)


def _optimiser(given: Given, out: Translation, steps: int) -> None:
    name = str(given.take("optimizer")).lower()
    if name not in ("adam", "adamw"):
        given.leave("optimizer", "AdamW is used in its place; `veneer methods` lists the others here")
    decay = given.take(f"optimizer_config.{name}.weight_decay") if name == "adamw" else 0.0
    out.settings["weight_decay"] = (
        0.01 if decay is None else float(decay)
    )  # mlx's AdamW decays unless told not to
    betas = given.take(f"optimizer_config.{name}.betas")
    out.settings |= without_nothing({"betas": tuple(betas) if betas else None})
    schedule = given.take("lr_schedule.name")
    arguments = given.take("lr_schedule.arguments") or [given.take("learning_rate")]
    given.take("learning_rate")
    out.settings |= {
        "lr": float(arguments[0]),
        "schedule": SCHEDULES.get(schedule, "constant"),
        "warmup": 0.0,
    }
    if schedule is not None and schedule not in SCHEDULES:
        given.leave("lr_schedule.name", "not a schedule here; cosine, linear and constant are")
    if number := given.take("lr_schedule.warmup"):
        out.settings["warmup"] = min(float(number) / steps, 0.99)
    given.leave("lr_schedule.warmup_init", "warm-up starts at 0 here", harmless=(0, 0.0))
