"""A training as one of several processes makes it, in a world of one: joined gradients, a divided base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

import veneer
from gpu import models
from gpu.agreement import FLOOR
from veneer import optim
from veneer.data.pack import Segment, Window
from veneer.optim.base import groups
from veneer.train import sharding
from veneer.train.group import Group
from veneer.train.loop.step import Learner
from veneer.train.world import ALONE, World

STEPS, LENGTH = 3, 24


def distributed(device: str, *, tiny: bool = False) -> dict[str, Any]:
    """Losses of three steps in a group, on a whole base (DDP) and a divided one (FSDP2), against those alone.

    A group of one joins no gradients, so its exchanges are also called by themselves.
    """
    expected, given = _losses(device, ALONE), torch.arange(8.0, device=device)
    figures: dict[str, Any] = {"problems": []}
    with _group(device) as world:
        summed, shared = world.sum(given), given.clone()
        world.share([shared])
        same = torch.equal(summed, given) and torch.equal(shared, given)
        figures["problems"] += [] if same else ["exchanges in a group of one change the tensor"]
        for name, divided in (("ddp", False), ("fsdp2", True)):
            found = _losses(device, world, divided=divided)
            off = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
            figures[f"{name}_off"] = off
            figures["problems"] += [f"{name}: losses are {off:.2g} off"] if off > FLOOR else []
    return figures


@contextmanager
def _group(device: str) -> Iterator[World]:
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            yield Group()
        finally:
            dist.destroy_process_group()


def _losses(device: str, world: World, *, divided: bool = False) -> list[float]:
    model, task = veneer.attach(models.llama(torch.float32, device), "lora", rank=4), models.task()
    models.randomise(model)
    parts = groups.of_adapter(model, "default")
    if divided:
        sharding.shard(model, task, parts, world, torch.device(device))
    built = optim.make("adamw").build(optim.Trained(parts))
    learner = Learner(model, parts, built, task, task.loss, 1.0, 0.01, world=world)
    return [learner.step([_rows(i)], 1e-3).loss for i in range(STEPS)]


def _rows(seed: int) -> list[Window]:
    given = models.batch("cpu", rows=4, length=LENGTH, seed=seed)
    pairs = zip(given["input_ids"], given["labels"], strict=True)
    return [(Segment(ids, labels, torch.ones(LENGTH)),) for ids, labels in pairs]
