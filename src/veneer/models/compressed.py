"""Opens a folder that `veneer compress` wrote: the model's configuration, its factored layers and all
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.compress import folder as folders
from veneer.errors import ConfigError


def load_compressed(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Returns the compressed language model in `folder`, in eval mode.

    dtype: of the weights; the stored one unless given. Raises FormatError for a folder that is damaged or of
    another kind.

        model = veneer.load_compressed("small")
        veneer.attach(model, "lora", rank=8)

    """
    from transformers import AutoConfig

    record = folders.description(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    model = hollow_model(config)
    folders.put_layers(model, record, wanted)
    folders.fill(model, folder, record, wanted)
    model.tie_weights()
    model.name_or_path = str(folder)
    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    found: nn.Module = model.requires_grad_(False).to(device).eval()
    return found


def hollow_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Returns the causal language model of a configuration with its parameters on the meta device and real
    buffers.

    dtype: of the parameters; the configuration's unless given.

    Buffers outside the state dict, such as rotary frequencies, are computed while a model is built and lie in
    no file.
    """
    from transformers import AutoModelForCausalLM

    try:
        with parameters_on_meta():
            given = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)
    except ValueError as e:
        raise ConfigError(
            f"model: {type(config).__name__} describes no causal language model ({e})"
        ) from None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the block every new parameter lies on the meta device as soon as its module holds it."""
    before = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        before(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = before  # type: ignore[method-assign]
