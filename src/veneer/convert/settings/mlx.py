"""mlx-lm's YAML and its adapter_config.json.

https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.convert.settings import execution
from veneer.convert.settings.given import UNSUPPORTED, Given, Translation, without_nothing
from veneer.convert.settings.trainer import OTHER_OPTIMISER, warmup
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
    "num_layers": "the last layers depend on the model; choose them by an expression in to=",
    "resume_adapter_file": "Veneer starts every training with a new adapter",
    "config": "the file itself",
    "val_batches": "set eval_windows",
}
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def translate(values: Mapping[str, Any], folder: Path = Path(), layers: int | None = None) -> Translation:
    """Returns Veneer's settings for an mlx-lm file.

    layers: number of layers of the base model, which turns "the last 16" into an expression. Raises
    ConfigError for an unknown fine_tune_type.
    """
    given, out = Given(values, DEFAULTS), Translation("mlx")
    kind = given.take("fine_tune_type")
    if kind not in ("lora", "dora", "full"):
        raise ConfigError(f"mlx-lm: fine_tune_type must be lora, dora or full, got {kind!r}")
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
    for key, why in {**dict.fromkeys(HARMLESS, UNSUPPORTED), **ELSEWHERE}.items():
        given.leave(key, why, HARMLESS.get(key, ()) + ((-1,) if key == "num_layers" else ()))
    out.uncarried += given.uncarried()
    return out


def _data(given: Given, out: Translation, folder: Path) -> None:
    """Translates a folder into its train.jsonl, valid.jsonl and test.jsonl; keeps names of data sets."""
    name = str(given.take("data"))
    where = folder / name
    if not where.is_dir():
        out.settings["data"] = (name,)
        return
    for part, ours in (("train", "data"), ("valid", "valid"), ("test", "test")):
        if (where / f"{part}.jsonl").is_file():
            out.settings[ours] = (str(where / f"{part}.jsonl"),)


def _targets(given: Given, out: Translation, kind: str, layers: int | None) -> None:
    """Translates rank, scale and layers: mlx-lm does not divide by the rank, so alpha = scale * rank."""
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
        given.leave("optimizer", OTHER_OPTIMISER)
    decay = given.take(f"optimizer_config.{name}.weight_decay") if name == "adamw" else 0.0
    out.settings["weight_decay"] = 0.01 if decay is None else float(decay)  # mlx's AdamW decays by default
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
        given.leave("lr_schedule.name", "unsupported schedule; supported: constant, cosine, linear")
    if number := given.take("lr_schedule.warmup"):
        out.settings["warmup"] = warmup(float(number), steps)
    given.leave("lr_schedule.warmup_init", "Veneer's warm-up starts at 0", harmless=(0, 0.0))
