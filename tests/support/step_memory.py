"""The memory of a real training step, tensor by tensor."""

from __future__ import annotations

import torch
from support import models

from veneer.analyse.cost.memory import Live, Saved
from veneer.tasks.base.shape import Shape
from veneer.tasks.text import next_token

SHAPE = Shape(rows=3, tokens=20, labels=50)


def batch(shape=SHAPE):
    """Windows of the shape, the first of whose positions are learned."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, models.VOCABULARY, (shape.rows, shape.tokens), generator=draw)
    labels = ids.flatten().clone()
    labels[shape.labels :] = next_token.IGNORED
    return {"input_ids": ids, "labels": labels.view_as(ids)}


def real_step(model, parameters):
    """Bytes alive and bytes kept of a real step on the same shape, as the trackers see them; no gradient
    is left."""
    model.train()
    next_token.loss(model, batch())  # the head is checked once, on logits that no later step makes
    live, saved = Live(), Saved([*model.parameters(), *model.buffers()])
    with live, saved.watching():
        next_token.loss(model, batch())[0].backward()
    for p in parameters:
        p.grad = None
    return live, saved
