"""Translates preference stages of axolotl, LLaMA-Factory and TRL into tasks on preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.convert.settings.given import NOTHING, UNSUPPORTED, Given, Translation
from veneer.errors import ConfigError, suggest

KINDS = ("sigmoid", "hinge", "robust")  # of task dpo
REFERENCE = "the reference is the base with its adapters off"
NATS = "nll: Veneer takes the mean of a pair's nats per token, TRL that of all tokens of a batch"
ODDS = "orpo: Veneer learns the chosen answers alone as text, TRL their prompts too"

AXOLOTL = ("dpo", "ipo", "orpo", "kto", "simpo")
AXOLOTL_BETA = {"orpo": "orpo_alpha"}  # else rl_beta
LLAMA_FACTORY = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
TRL = ("dpo", "kto", "orpo", "cpo")  # trainers
# Settings that a trainer of TRL alone has; `beta` and `loss_type` are shared.
TRL_SIGNS = {
    "kto": ("desirable_weight", "undesirable_weight"),
    "cpo": ("simpo_gamma", "cpo_alpha"),
    "dpo": ("ld_alpha", "use_weighting", "f_divergence_type", "loss_weights", "beta"),
}
TRL_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-6, "beta": 0.1}  # of trl 1.16
HARMLESS: dict[str, tuple[Any, ...]] = {
    "disable_dropout": (True,),
    "precompute_ref_log_probs": (True, False),
    "precompute_ref_batch_size": (),
    "use_weighting": (False,),
    "f_divergence_type": ("reverse_kl",),
    "sync_ref_model": (False,),
    "generate_during_eval": (False,),
    "dpo_use_weighting": (False,),
    "dpo_generate_during_eval": (False,),
    "dpo_padding_free": (True, False),
    "dpo_use_logits_to_keep": (True, False),
    "rl_adapter_ref_model": (False,),
}
ELSEWHERE = {
    "ref_model": REFERENCE,
    "ref_model_adapters": REFERENCE,
    "ref_model_quantization_bit": REFERENCE,
    "sync_ref_model": REFERENCE,
    "precompute_ref_batch_size": "the reference is computed in each step",
    "max_prompt_length": "length bounds prompt and answer together",
    "max_prompt_len": "length bounds prompt and answer together",
    "max_completion_length": "length bounds prompt and answer together",
}


def axolotl(given: Given, out: Translation) -> bool:
    """Translates `rl`; tells if it is a preference stage. Raises ConfigError for other kinds of it."""
    rl = given.take("rl")
    if rl in NOTHING:
        return False
    if rl not in AXOLOTL:
        raise ConfigError(f"axolotl: rl must be {', '.join(AXOLOTL)}, got {rl!r}{suggest(str(rl), AXOLOTL)}")
    options: dict[str, Any] = {}
    betas = [given.take(key) for key in (AXOLOTL_BETA.get(rl, "rl_beta"), "dpo_beta")]
    _take(options, "beta", next((b for b in betas if b not in NOTHING), 0.1))
    if rl == "simpo":
        gamma, alpha = given.take("simpo_gamma"), given.take("cpo_alpha")
        options["gamma"] = 0.5 if gamma in NOTHING else float(gamma)
        _nats(options, out, 1.0 if alpha in NOTHING else float(alpha))
    elif rl == "dpo":
        _losses(given, out, options, "dpo_loss_type", given.take("dpo_loss_type"), None)
        _smoothed(given, out, "dpo_label_smoothing")
        _nats(options, out, float(given.take("rpo_alpha") or 0.0))
    elif rl == "kto":
        _weights(given, options, "kto_desirable_weight", "kto_undesirable_weight")
    if rl == "orpo":
        out.notes.append(ODDS)
    _finish(given, out, out.settings.get("task", rl), options)
    return True


def llamafactory(given: Given, out: Translation, stage: str) -> None:
    """Translates the stages dpo and kto. Raises ConfigError for a loss without a counterpart."""
    options: dict[str, Any] = {}
    _take(options, "beta", given.take("pref_beta") or 0.1)
    nats = float(given.take("pref_ftx") or 0.0)
    if stage == "kto":
        _weights(given, options, "kto_chosen_weight", "kto_rejected_weight")
        given.leave("pref_ftx", "task kto adds no nats of the answers", (0, 0.0))
        return _finish(given, out, "kto", options)
    loss = given.take("pref_loss") or "sigmoid"
    if loss not in LLAMA_FACTORY:
        raise ConfigError(f"LLaMA-Factory: pref_loss must be {', '.join(LLAMA_FACTORY)}, got {loss!r}")
    task = LLAMA_FACTORY[loss]
    options |= {"kind": "hinge"} if loss == "hinge" else {}
    if task == "simpo":
        gamma = given.take("simpo_gamma")
        options["gamma"] = 0.5 if gamma in NOTHING else float(gamma)
    if task == "dpo":
        _smoothed(given, out, "dpo_label_smoothing")
    if task in ("dpo", "simpo"):
        options |= {"nll": nats} if nats else {}
    else:
        given.leave("pref_ftx", f"task {task} adds no nats of the answers", (0, 0.0))
    given.leave("pref_bco_weight", UNSUPPORTED, (0, 0.0))
    _finish(given, out, task, options)


def stage_of_trl(values: Mapping[str, Any], tool: str) -> str | None:
    """Returns dpo, kto, orpo or cpo for a file of one of these trainers, None for supervised training.

    tool: trl, or trl-dpo and so on, which names the trainer: files do not.
    """
    named = tool.partition("-")[2]
    losses = _listed(values.get("loss_type"))
    if named:
        return named
    if "simpo" in losses:
        return "cpo"
    if "kto" in losses:
        return "kto"
    found = (stage for stage, signs in TRL_SIGNS.items() if any(sign in values for sign in signs))
    return next(found, "dpo" if any(loss in losses for loss in (*KINDS, "ipo")) else None)


def trl(given: Given, out: Translation, stage: str) -> None:
    """Translates the losses of TRL's preference trainers. Raises ConfigError for others."""
    options: dict[str, Any] = {}
    _take(options, "beta", given.take("beta"))
    task: str = stage
    if stage == "dpo":
        _losses(given, out, options, "loss_type", given.take("loss_type"), given.take("loss_weights"))
        task = out.settings.get("task", "dpo")
        _smoothed(given, out, "label_smoothing")
    elif stage == "kto":
        _only(given, "kto", "kto")
        _weights(given, options, "desirable_weight", "undesirable_weight")
    elif stage == "orpo":
        out.notes.append(ODDS)
    else:
        _only(given, "cpo", "simpo")
        task, gamma, alpha = "simpo", given.take("simpo_gamma"), given.take("cpo_alpha")
        options["gamma"] = 0.5 if gamma in NOTHING else float(gamma)
        _nats(options, out, 1.0 if alpha in NOTHING else float(alpha))
        given.leave("label_smoothing", "task simpo has no smoothing", (0, 0.0))
        given.leave("alpha", UNSUPPORTED, (0, 0.0))
    if stage in ("dpo", "orpo") and set(given.values).isdisjoint(TRL_SIGNS["dpo"][:-1]):
        out.notes.append(
            f"the file is read as one of trl {stage}; tool= names another: trl-{', trl-'.join(TRL)}"
        )
    _finish(given, out, task, options)


def _losses(
    given: Given, out: Translation, options: dict[str, Any], key: str, kinds: Any, weights: Any
) -> None:
    """Translates one loss, or a loss beside the nats of chosen answers. Raises ConfigError for others."""
    names = _listed(kinds) or ["sigmoid"]
    shares = dict(zip(names, weights or [1.0] * len(names), strict=False))
    nats = float(shares.pop("sft", 0.0))
    odd = [n for n in shares if n not in (*KINDS, "ipo")]
    if odd or len(shares) != 1 or next(iter(shares.values())) != 1:
        known = ", ".join((*KINDS, "ipo"))
        raise ConfigError(f"{out.tool}: {key} must be {known}, of weight 1, alone or with sft, got {kinds!r}")
    (name,) = shares
    if name == "ipo":
        out.settings["task"] = "ipo"
        if nats:
            given.leave(key, "task ipo adds no nats of the answers")
        return
    options |= {"kind": name} if name != "sigmoid" else {}
    _nats(options, out, nats)


def _only(given: Given, stage: str, loss: str) -> None:
    found = _listed(given.take("loss_type"))
    if found != [loss] and (found or stage == "cpo"):
        raise ConfigError(
            f"trl: loss_type of {stage} must be {loss}, got {found[0] if found else 'sigmoid'!r}"
        )


def _listed(value: Any) -> list[str]:
    if value in NOTHING:
        return []
    return [value] if isinstance(value, str) else [str(v) for v in value]


def _take(options: dict[str, Any], name: str, value: Any) -> None:
    options |= {} if value in NOTHING else {name: float(value)}


def _nats(options: dict[str, Any], out: Translation, weight: float) -> None:
    if weight:
        options["nll"] = weight
        out.notes.append(NATS)


def _smoothed(given: Given, out: Translation, key: str) -> None:
    smoothing = given.take(key)
    if smoothing and out.settings.get("task") == "ipo":
        given.leave(key, "task ipo has no smoothing")
    elif smoothing:
        out.settings["label_smoothing"] = float(smoothing)


def _weights(given: Given, options: dict[str, Any], good: str, bad: str) -> None:
    for name, key in (("desirable", good), ("undesirable", bad)):
        _take(options, name, given.take(key))


def _finish(given: Given, out: Translation, task: str, options: dict[str, Any]) -> None:
    out.settings |= {"task": task, "task_options": options}
    for key in (*HARMLESS, *ELSEWHERE):
        given.leave(key, ELSEWHERE.get(key, UNSUPPORTED), HARMLESS.get(key, ()))


def without_text(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings without those of texts, which tasks on preferences do not have."""
    return {k: v for k, v in settings.items() if k not in ("packing", "train_on")}
