"""Adapters in use on the device: many in one batch, merged, in generation, and served."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch

import veneer
from gpu import models
from gpu.agreement import FLOOR
from veneer.adapt.attached import changes

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("lora", {"rank": 4}),
    "b": ("dora", {"rank": 2}),
    "c": ("lora", {"rank": 8, "init": "pissa"}),
}


def _with_adapters(device: str, dtype: torch.dtype = torch.float32) -> Any:
    warnings.simplefilter("ignore")
    model = models.llama(dtype, device)
    for i, (name, (method, options)) in enumerate(METHODS.items()):
        veneer.attach(model, method, name=name, **options)
        draw = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for _, delta in changes(model, name):
                for p in delta.parameters():
                    p.add_((0.05 * torch.randn(p.shape, generator=draw)).to(p))
    return model


def bank(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """A batch with an adapter for each row against one at a time."""
    model = _with_adapters(device)
    ids = models.batch(device, rows=4)["input_ids"]
    wanted = []
    with torch.no_grad():
        for i, name in enumerate([*METHODS, None]):
            with veneer.using(model, *([name] if name else [])):
                wanted.append(model(input_ids=ids[i : i + 1]).logits)
        rows = veneer.bank(model, list(METHODS))
        rows.use([*METHODS, None])
        found = model(input_ids=ids).logits
    off = models.off(found.float().cpu(), torch.cat(wanted).float().cpu())
    return {"bank_off": off, "problems": [f"rows are {off:.2g} off"] if off > FLOOR else []}


def merge(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Outputs before and after a merge in float32."""
    model = models.llama(torch.float32, device)
    models.randomise(veneer.attach(model, "dora", rank=4))
    ids = models.batch(device)["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        veneer.merge(model)
        after = model(input_ids=ids).logits
    off = models.off(after.cpu(), before.cpu())
    return {"merge_off": off, "problems": [f"outputs are {off:.2g} off"] if off > FLOOR else []}


def generate(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Greedy tokens of the adapter against those of the merged model."""
    model = models.llama(torch.float32, device, use_cache=True)
    models.randomise(veneer.attach(model, "lora", rank=4), size=0.2)
    ids = models.batch(device)["input_ids"]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    before = model.generate(ids, **options)
    veneer.merge(model)
    after = model.generate(ids, **options)
    same = float((before == after).float().mean())
    return {"generate_same": same, "problems": [] if same > 0.95 else [f"{same:.0%} of the tokens agree"]}


def serve(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Answers of a server against those of the model alone."""
    from veneer.models import pretrained

    model: Any = pretrained.causal_lm("builtin", torch.float32, torch.device(device))
    tokenizer = pretrained.tokenizer("builtin")
    veneer.attach(model, "lora", rank=4, name="a")
    deltas: list[Any] = [delta for _, delta in changes(model, "a")]
    with torch.no_grad():
        for delta in deltas:
            delta.B.normal_(std=0.05)
    prompt = "The weather is"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(device)
    with veneer.using(model, "a"):
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
        written = model.generate(ids, **options)[0, ids.shape[1] :]
    wanted = tokenizer.decode(written, skip_special_tokens=True)
    with veneer.serve(model, {"a": "a"}, tokenizer=tokenizer, watch=0) as server:
        found = server.complete(prompt, "a", max_tokens=8, temperature=0.0)
    same = found.text == wanted
    said = json.dumps([found.text, wanted])
    return {"serve_same": float(same), "problems": [] if same else [f"answers differ: {said}"]}
