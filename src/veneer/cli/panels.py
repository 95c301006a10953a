"""Sorts flags into the panels of --help."""

from __future__ import annotations

from collections.abc import Mapping

START, DATA, MODEL, METHOD = "To begin with", "Data", "Model", "Method"
OPTIMISER, SCHEDULE, EVALUATION = "Optimiser", "Schedule", "Evaluation"
SPEED, OUTPUT, OTHER = "Speed and memory", "Output", "Options"
ORDER = (START, DATA, MODEL, METHOD, OPTIMISER, SCHEDULE, EVALUATION, SPEED, OUTPUT, OTHER)

# The settings of a run; options of methods and optimisers are in the panels of these.
PANELS: Mapping[str, str] = {
    name: panel
    for panel, names in {
        START: "data model out config method rank to lr steps batch",
        DATA: "valid test known length overlong empty packing columns prompt_template chat_template"
        " train_on train_roles train_turns stream buffer",
        MODEL: "untie exclude quantise device",
        METHOD: "rank_pattern alpha_pattern calibration",
        OPTIMISER: "optimiser embedding_lr weight_decay betas clip label_smoothing seed",
        SCHEDULE: "epochs schedule warmup accumulate",
        EVALUATION: "eval_every eval_windows report",
        SPEED: "precision compile gradient_checkpointing cache_frozen probe",
        OUTPUT: "save_every keep track resume allow",
    }.items()
    for name in names.split()
}


def panel_of(name: str, kind: str = "") -> str:
    """Returns the panel of a setting, or of an option of a "method" or an "optimiser"."""
    own = {"method": METHOD, "optimiser": OPTIMISER}.get(kind, OTHER)
    return PANELS.get(name, own)


def place(panel: str | None) -> int:
    """Returns the panel's place in --help."""
    return ORDER.index(panel) if panel in ORDER else len(ORDER)
