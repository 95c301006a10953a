"""Ways through the loop: compiled, as graphs, chunked, without masks, recomputed, on quantised weights."""

from __future__ import annotations

import importlib.util
import time
import warnings
from typing import Any

import torch

import veneer
from gpu import models
from gpu.agreement import FLOOR, judged
from gpu.parts import Skipped
from veneer.train.speed import compiling


def _adapted(device: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Any:
    warnings.simplefilter("ignore")
    model = veneer.attach(models.llama(dtype, device, **config), "lora", rank=4)
    models.randomise(model)
    return model


def _compared(device: str, *, with_graphs: bool, tiny: bool) -> dict[str, Any]:
    """A compiled step's gradients against float32 on the CPU. tiny: nothing is compiled."""
    given, name = models.batch(device), "graphs" if with_graphs else "compiled"
    exact = models.outputs(_adapted("cpu", torch.float32), models.batch("cpu"))
    plain = models.outputs(_adapted(device), given)
    model, begun = _adapted(device).train(), time.monotonic()
    objective = compiling.prepare(model, models.task(), given, compiled=True, with_graphs=with_graphs)
    with compiling.eagerly(tiny):
        compiling.warm_up(model, objective, given)
        seconds = time.monotonic() - begun
        first, again = (models.outputs(model, given, objective) for _ in range(2))
    problems = [judged((exact[1], plain[1], f[1]), f"{name} gradients") for f in (first, again)]
    return {f"{name}_seconds": seconds, "problems": [p for p in problems if p]}


def compiled(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Compiled blocks."""
    return _compared(device, with_graphs=False, tiny=tiny)


def graphs(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Compiled blocks as CUDA graphs."""
    from veneer.train.speed.graphs import reason_against

    reason = reason_against(torch.device(device))
    if reason:
        raise Skipped(reason)
    return _compared(device, with_graphs=True, tiny=tiny)


def chunked_loss(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """The loss in chunks against that of whole logits."""
    from veneer.tasks.text import next_token

    model, given = _adapted(device, torch.float32), models.batch(device, rows=4, length=96)
    whole = models.outputs(model, given, lambda m, b: next_token.loss(m, b, chunked=False))
    found = models.outputs(model, given, lambda m, b: next_token.loss(m, b, chunked=True))
    off = models.off(found[1], whole[1])
    problems = [f"gradients are {off:.2g} off"] if off > FLOOR else []
    return {"chunked_loss_off": off, "problems": problems}


def documents(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Documents packed into one window, attended without a mask, against each alone."""
    from veneer.train.speed import fast_attention

    model = _adapted(device)
    rows = models.batch(device, rows=3, length=20)["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=rows).logits.float().cpu().flatten(0, 1)
        positions = torch.arange(20, device=device).repeat(3)[None]
        joined = {"input_ids": rows.reshape(1, -1), "position_ids": positions}
        masked = model(**joined).logits.float().cpu()[0]
        fast_attention.use_faster(model, torch.zeros(1, 60, dtype=torch.int64, device=device), compiled=False)
        found = model(**joined).logits.float().cpu()[0]
    problem = judged((alone, masked, found), "packed outputs")
    return {"documents_off": models.off(found, alone), "problems": [problem] if problem else []}


def checkpointing(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Gradients with the blocks recomputed in the backward pass."""
    model, given = _adapted(device).train(), models.batch(device)
    plain = models.outputs(model, given)
    with compiling.recomputing(model):
        again = models.outputs(model, given)
    off = models.off(again[1], plain[1])
    problems = [f"gradients are {off:.2g} off"] if off > FLOOR else []
    return {"checkpointing_off": off, "problems": problems}


def quantised(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Own formats on the device against the CPU; layers of bitsandbytes and torchao where installed."""
    from veneer.ops import quant

    figures: dict[str, Any] = {"problems": []}
    for name in quant.FORMATS:
        found = []
        for where in ("cpu", device):
            model = veneer.quantise(models.llama(torch.bfloat16, where), name)
            veneer.attach(model, "lora", rank=4)
            models.randomise(model)
            found.append(models.outputs(model, models.batch(where)))
        figures[f"{name}_off"] = off = models.off(found[1][0], found[0][0])
        figures["problems"] += [f"{name}: outputs are {off:.2g} off the CPU's"] if off > 4 * FLOOR else []
    for package, attach in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        if importlib.util.find_spec(package) and device != "cpu":
            model = attach(models.llama(torch.bfloat16, device))
            models.randomise(veneer.attach(model, "lora", rank=4, to=["q_proj"]))
            gradients = models.outputs(model, models.batch(device))[1]
            fine = bool(gradients.isfinite().all() and gradients.norm() > 0)
            figures[f"{package}_learns"] = float(fine)
            figures["problems"] += [] if fine else [f"{package}: no finite gradient"]
    return figures


def _bitsandbytes(model: Any) -> Any:
    import bitsandbytes as bnb  # type: ignore[import-not-found, unused-ignore]

    for block in model.model.layers:
        own = block.self_attn.q_proj
        layer = bnb.nn.Linear4bit(own.in_features, own.out_features, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(own.weight.data.cpu(), quant_type="nf4", requires_grad=False)
        block.self_attn.q_proj = layer.to(own.weight.device)
    return model


def _torchao(model: Any) -> Any:
    import torchao.quantization as ao  # type: ignore[import-not-found, unused-ignore]

    ao.quantize_(model.model.layers, ao.Int8WeightOnlyConfig())
    return model
