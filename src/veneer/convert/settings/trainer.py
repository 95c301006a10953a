"""Translates settings that axolotl and LLaMA-Factory share: those of transformers' Trainer and of PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.convert.settings.given import Given, Translation, without_nothing

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
OTHER_OPTIMISER = "AdamW is used instead; `veneer methods` lists the supported optimisers"
STATE_BITS = "Veneer's AdamW keeps its state in 32 bits"
DECAY = "weight_decay: Veneer decays the product B A, the other program A and B separately"
RHYTHM = "Veneer evaluates and saves every so many steps"
STARTS = {True: "kaiming", "true": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def optimiser(given: Given, out: Translation, key: str) -> None:
    """Translates any AdamW, and LoRA+ if a ratio is given."""
    name, ratio = str(given.take(key)), given.take("loraplus_lr_ratio")
    if not name.startswith(("adamw", "paged_adamw", "OptimizerNames.ADAMW")):
        given.leave(key, OTHER_OPTIMISER)
    elif "8bit" in name:
        given.leave(key, STATE_BITS)
    embedding = given.take("loraplus_lr_embedding")
    if ratio is not None:
        out.settings |= {"optimiser": "loraplus", "optimiser_options": {"ratio": float(ratio)}}
        out.settings |= without_nothing({"embedding_lr": embedding})
    if given.take("weight_decay"):
        out.notes.append(DECAY)
    out.settings["weight_decay"] = float(given.take("weight_decay") or 0.0)
    betas = given.take("adam_beta1"), given.take("adam_beta2")
    if betas != (None, None):
        out.settings["betas"] = (float(betas[0] or 0.9), float(betas[1] or 0.999))
    given.leave("adam_epsilon", "Veneer uses 1e-8", harmless=(1e-8,))
    clip = given.take("max_grad_norm")
    out.settings["clip"] = 1.0 if clip is None else float(clip)


def schedule(given: Given, out: Translation, key: str) -> None:
    """Translates schedule, warm-up and length. Steps override epochs, as in the Trainer."""
    name = given.take(key)
    if name in SCHEDULES:
        out.settings["schedule"] = SCHEDULES[name]
    else:
        given.leave(key, f"unsupported schedule; supported: {', '.join(sorted(set(SCHEDULES.values())))}")
    steps = given.take("max_steps")
    epochs = given.take("num_epochs" if "num_epochs" in given.defaults else "num_train_epochs")
    steps = int(steps) if steps and int(steps) > 0 else None
    out.settings |= {"steps": steps} if steps else {"epochs": float(epochs)}
    ratio, number = given.take("warmup_ratio"), given.take("warmup_steps")
    # The Trainer takes a share in warmup_steps too.
    out.settings["warmup"] = warmup(float(number), steps) if number else float(ratio or 0.0)


def warmup(number: float, steps: int | None) -> float:
    """Returns a warm-up in steps, shorter than the training if its length is known; a share below 1 stays."""
    return number if number < 1 else float(min(int(number), (steps or 1 << 62) - 1))


def noise_and_patience(given: Given, out: Translation) -> None:
    """Translates NEFTune and early stopping."""
    noise, patience = given.take("neftune_noise_alpha"), given.take("early_stopping_patience")
    out.settings |= {"neftune": float(noise)} if noise else {}
    out.settings |= {"patience": int(patience)} if patience else {}


def arguments(given: Given, out: Translation) -> None:
    """Translates the arguments of transformers' Trainer that keep their names in programs built on it."""
    optimiser(given, out, "optim")
    schedule(given, out, "lr_scheduler_type")
    rhythm(given, out)
    precision(given, out)
    noise_and_patience(given, out)
    smoothing = given.take("label_smoothing_factor")
    out.settings |= {"label_smoothing": float(smoothing)} if smoothing else {}


def galore(given: Given, out: Translation, names: Mapping[str, str]) -> None:
    """Translates GaLore. names: the other program's keys for rank, period and scale."""
    options = {ours: given.take(theirs) for ours, theirs in names.items()}
    out.settings |= {"optimiser": "galore", "optimiser_options": without_nothing(options)}


def rhythm(given: Given, out: Translation) -> None:
    """Translates distances of evaluations and checkpoints that are numbers of steps."""
    for theirs, ours in (("eval_steps", "eval_every"), ("save_steps", "save_every")):
        value = given.take(theirs)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            out.settings[ours] = value
        else:
            given.leave(theirs, f"{RHYTHM}; set eval_every and save_every")
    for key in ("eval_strategy", "save_strategy"):
        given.leave(key, RHYTHM, harmless=("steps",))
    keep = given.take("save_total_limit")
    if keep is not None:
        out.settings["keep"] = max(2, int(keep))
        if int(keep) < 2:
            out.notes.append("keep is 2, so that one checkpoint remains if the newest is damaged")
    if given.take("resume_from_checkpoint") not in (None, False, "false"):
        out.settings["resume"] = True
        out.notes.append(
            "resume continues from the newest checkpoint in the folder out=, not from a named folder"
        )


def precision(given: Given, out: Translation) -> None:
    """Translates bf16 and float32; training in float16 is not supported."""
    if (
        given.take("bf16") in (True, "true")
        or given.take("bfloat16") is True
        or given.take("pure_bf16") is True
    ):
        out.settings["precision"] = "bf16"
    elif given.take("float32") is True or given.take("bf16") is False:
        out.settings["precision"] = "fp32"
    for key in ("fp16", "float16"):
        given.leave(key, "Veneer trains in bf16 or fp32", harmless=(False,))


def start(given: Given, out: Translation, key: str) -> None:
    """Translates PEFT's init_lora_weights."""
    name: Any = given.take(key)
    name = name.lower() if isinstance(name, str) else name
    if name in STARTS:
        out.settings["options"]["init"] = STARTS[name]
    elif isinstance(name, str) and name.startswith("pissa_niter"):
        out.settings["options"]["init"] = "pissa"
        out.notes.append(
            f"{key} {name}: Veneer seeds PiSSA's randomised SVD and fixes its number of iterations"
        )
    else:
        given.leave(key, "unsupported initialisation")
