"""Opens a folder of PEFT's on a model through PEFT itself, as changes of the model's own layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer import files, foreign
from veneer.adapt.attached import Changes
from veneer.adapt.hooks import clashing
from veneer.adapt.peft import adapter_names, reading
from veneer.adapt.peft.settings import CONFIG, PREFIX, TENSORS
from veneer.adapt.peft.targets import Config, expressions, wrapped
from veneer.adapt.peft.types import CONVERTED
from veneer.adapt.peft.whole import outermost, whole_module
from veneer.adapt.store.problems import Problem, refuse
from veneer.convert.merged.layers import of_layer
from veneer.errors import ConfigError, FormatError, option
from veneer.sites.own import base_modules

MISSING = "this type of adapter opens through PEFT, which is not installed; pip install 'veneer[peft]'"
TASKS = "POLY"  # the type with a mixture for every task


def opens(config: Mapping[str, Any]) -> bool:
    """Returns True for settings of a type that opens through PEFT."""
    return config.get("peft_type") in CONVERTED


@torch.no_grad()
def to_changes(model: nn.Module, folder: Path, task: int | None = None) -> Changes:
    """Returns the adapter in PEFT's folder as deltas of the model's layers, not attached.

    The model is as before afterwards. task: number of the task, for POLY. Raises FormatError for tensors that
    are missing or belong to no layer, for settings beside the change of the targeted layers, and for a layer
    whose merge does not compute what the adapter computes; ConfigError for a task that is missing or unknown.
    """
    files.refuse_pickle(folder, TENSORS)
    config, tensors = (
        files.read_json(folder / CONFIG),
        adapter_names.without(files.read_tensors(folder / TENSORS)),
    )
    foreign.check_expressions(expressions(config), list(base_modules(model)), CONFIG)
    task = _task(config, task)
    problems, used, changes = _settings(config), set[str](), list[Any]()
    for name in outermost(wrapped(config, base_modules(model))):
        changes += whole_module(model, name, tensors, used, problems)
    copies = {k for k in tensors if _is_copy(model, k)} - used
    problems += reading.left_over(model, {k: tensors[k] for k in copies})
    refuse(f"{folder} cannot be converted", problems)
    own = {k: t for k, t in tensors.items() if k not in used | copies}
    bare = {k: v for k, v in config.items() if k != "modules_to_save"}
    with _adapted(model, bare, own, folder) as layers:
        for name, layer in layers:
            changes += of_layer(name, layer, task)
    refuse(f"{folder} cannot be converted", clashing_sites(changes))
    return changes


def clashing_sites(changes: Changes) -> list[Problem]:
    """Returns a problem if an attached adapter holds a layer as another kind of site."""
    wrong = clashing(site for site, _ in changes)
    return (
        [Problem("fit", f"{', '.join(wrong)}: another adapter holds them; detach it first")] if wrong else []
    )


def _task(config: Config, task: int | None) -> int | None:
    """Returns the task to open. Raises ConfigError for one that is missing, unknown, or of another type."""
    if config["peft_type"] != TASKS:
        if task is not None:
            raise ConfigError(f"{option('poly_task')} is for PEFT's {TASKS}; this is {config['peft_type']}")
        return None
    known = int(config["n_tasks"])
    if task is None or not 0 <= task < known:
        raise ConfigError(
            f"{option('poly_task')} must be a number from 0 to {known - 1} for PEFT's {TASKS}, got {task}"
        )
    return task


def _settings(config: Config) -> list[Problem]:
    """Returns problems with settings that ask for more than changes of the targeted layers."""
    found = []
    if config.get("bias") not in (None, "none"):
        found.append(f"bias={config['bias']!r}: the base's biases were trained too")
    if config.get("save_projection") is False:
        found.append("save_projection=False: another machine's draw cannot be repeated")
    if config.get("layer_replication") or config.get("target_parameters"):
        found.append("layer_replication and target_parameters change more than the targeted layers")
    return [Problem("fit", f"{text}; merge it in PEFT and keep the merged model") for text in found]


def _is_copy(model: nn.Module, key: str) -> bool:
    """Returns True for a tensor that PEFT copied from the base, such as an embedding."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    return key.startswith(PREFIX) and name in dict(model.named_parameters(remove_duplicate=False))


@contextmanager
def _adapted(
    model: nn.Module, config: Config, tensors: Mapping[str, Tensor], folder: Path
) -> Iterator[list[tuple[str, Any]]]:
    """Yields PEFT's layers by the names of the layers that they wrap; takes them out again at the end."""
    try:
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise ConfigError(MISSING) from None
    with _unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about starts and devices, of an adapter that is only read
        try:
            made = peft.PeftModel(model, _config(config))
            _fill(made, tensors)
        except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError) as e:
            raise FormatError(
                f"{folder}: PEFT {peft.__version__} cannot open this {config['peft_type']} on this base:"
                f" {str(e).splitlines()[0] if str(e) else type(e).__name__}"
            ) from e
        yield [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _config(config: Config) -> Any:
    """Returns PEFT's settings object. Raises ValueError for settings that this version of PEFT lacks."""
    import peft

    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    made = kind.from_peft_type(**config)
    unknown = [k for k in config if not hasattr(made, k)]
    if unknown:
        raise ValueError(f"it has no settings {', '.join(unknown)}")
    made.inference_mode = True
    return made


def _fill(made: Any, tensors: Mapping[str, Tensor]) -> None:
    """Puts the tensors into PEFT's model. Raises ValueError for tensors that are missing or left over."""
    import peft

    result: Any = peft.set_peft_model_state_dict(made, dict(tensors))
    wanted = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    topk = getattr(made.peft_config["default"], "save_only_topk_weights", False)  # under other names
    missing = [] if topk else sorted(set(wanted) - set(tensors))
    wrong = [f"missing: {', '.join(missing)}"] if missing else []
    if result.unexpected_keys:
        wrong.append(f"tensors that belong to no layer: {', '.join(result.unexpected_keys)}")
    if wrong:
        raise ValueError("; ".join(wrong))


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restores the model's modules, hooks and flags at the end of the block."""
    kept = {
        m: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()
    }
    flags = [(p, p.requires_grad, p._version) for p in model.parameters()]
    try:
        yield
    finally:
        for module, state in kept.items():
            own = vars(module)
            for name in [k for k in own if k not in state]:
                del own[name]
            for name, value in state.items():
                if isinstance(own.get(name), dict) and isinstance(value, dict):
                    own[name].clear()
                    own[name].update(value)
                else:
                    own[name] = value
        for p, wanted, _ in flags:
            p.requires_grad_(wanted)
    if any(p._version != version for p, _, version in flags):
        raise FormatError("PEFT changed the base's weights while it opened the adapter; merge it in PEFT")
