"""What axolotl and LLaMA-Factory share: the settings of transformers' Trainer, and PEFT's starts."""

from __future__ import annotations

from typing import Any

from veneer.convert.settings.given import Given, Translation, without_nothing

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
STARTS = {True: "kaiming", "true": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}


def optimiser(given: Given, out: Translation, key: str) -> None:
    """AdamW of any make, with LoRA+ where a ratio is given."""
    name, ratio = str(given.take(key)), given.take("loraplus_lr_ratio")
    if not name.startswith(("adamw", "paged_adamw", "OptimizerNames.ADAMW")):
        given.leave(key, "AdamW is used in its place; `veneer methods` lists the others here")
    elif "8bit" in name:
        given.leave(key, "AdamW keeps its state in 32 bits here")
    embedding = given.take("loraplus_lr_embedding")
    if ratio is not None:
        out.settings |= {"optimiser": "loraplus", "optimiser_options": {"ratio": float(ratio)}}
        out.settings |= without_nothing({"embedding_lr": embedding})
    if given.take("weight_decay"):
        out.notes.append("weight_decay shrinks the product B A here, and A and B apart there")
    out.settings["weight_decay"] = float(given.take("weight_decay") or 0.0)
    betas = given.take("adam_beta1"), given.take("adam_beta2")
    if betas != (None, None):
        out.settings["betas"] = (float(betas[0] or 0.9), float(betas[1] or 0.999))
    given.leave("adam_epsilon", "1e-8 is used here", harmless=(1e-8,))
    clip = given.take("max_grad_norm")
    out.settings["clip"] = 1.0 if clip is None else float(clip)


def schedule(given: Given, out: Translation, key: str) -> None:
    """Rate, warm-up and length. Steps beat epochs, as in the Trainer."""
    name = given.take(key)
    if name in SCHEDULES:
        out.settings["schedule"] = SCHEDULES[name]
    else:
        given.leave(key, f"not a schedule here; {', '.join(sorted(set(SCHEDULES.values())))} are")
    steps, epochs = (
        given.take("max_steps"),
        given.take("num_epochs" if "num_epochs" in given.defaults else "num_train_epochs"),
    )
    steps = int(steps) if steps and int(steps) > 0 else None
    out.settings |= {"steps": steps} if steps else {"epochs": float(epochs)}
    out.settings["warmup"] = warmup(given, out, "warmup_steps", steps)


def warmup(given: Given, out: Translation, key: str, steps: int | None) -> float:
    """The share of the steps: given as such, or as a number of steps where the length is known in steps."""
    ratio, number = given.take("warmup_ratio"), given.take(key)
    if number and steps:
        return min(float(number) / steps, 0.99)
    if number and 0 < float(number) < 1:  # the Trainer takes a share here too
        return float(number)
    if number:
        given.leave(
            key,
            "warm-up is a share of the steps here, and the number of steps is not in the file; set warmup",
        )
    return float(ratio or 0.0)


def rhythm(given: Given, out: Translation) -> None:
    """Distances of evaluations and checkpoints, where they are numbers of steps."""
    for theirs, ours in (("eval_steps", "eval_every"), ("save_steps", "save_every")):
        value = given.take(theirs)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            out.settings[ours] = value
        else:
            given.leave(
                theirs,
                "evaluations and checkpoints come every so many steps here; set eval_every and save_every",
            )
    for key in ("eval_strategy", "save_strategy"):
        given.leave(key, "evaluations and checkpoints come every so many steps here", harmless=("steps",))
    keep = given.take("save_total_limit")
    if keep is not None:
        out.settings["keep"] = max(2, int(keep))
        if int(keep) < 2:
            out.notes.append("keep is 2, so that a checkpoint is left if the newest is damaged")
    if given.take("resume_from_checkpoint") not in (None, False, "false"):
        out.settings["resume"] = True
        out.notes.append(
            "resume goes on in the folder out= from its newest checkpoint, not from a folder that is named"
        )


def precision(given: Given, out: Translation) -> None:
    """bf16, or float32 where it is asked for; half precision in float16 is not trained here."""
    if (
        given.take("bf16") in (True, "true")
        or given.take("bfloat16") is True
        or given.take("pure_bf16") is True
    ):
        out.settings["precision"] = "bf16"
    elif given.take("float32") is True or given.take("bf16") is False:
        out.settings["precision"] = "fp32"
    for key in ("fp16", "float16"):
        given.leave(key, "float16 is not trained in here; bf16 and fp32 are", harmless=(False,))


def start(given: Given, out: Translation, key: str) -> None:
    """PEFT's init_lora_weights."""
    name: Any = given.take(key)
    name = name.lower() if isinstance(name, str) else name
    if name in STARTS:
        out.settings["options"]["init"] = STARTS[name]
    elif isinstance(name, str) and name.startswith("pissa_niter"):
        out.settings["options"]["init"] = "pissa"
        out.notes.append(
            f"{key} {name}: PiSSA's randomised SVD is seeded here, with its own number of iterations"
        )
    else:
        given.leave(key, "not a start here")
