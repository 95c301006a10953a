"""Tiny random models for tests: every call builds a fresh one, the same for the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97
# Of a small decoder with grouped-query attention, for the configurations of transformers.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(seed: int = 0, **config: Any) -> nn.Module:
    """A Llama with grouped-query attention: hidden 32, 2 layers, untied output head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(**{**SIZES, "vocab_size": VOCABULARY}, tie_word_embeddings=False, initializer_range=0.2)
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def gpt2(seed: int = 0, **config: Any) -> nn.Module:
    """A GPT-2, whose linear layers are Conv1D: hidden 32, 2 layers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    settings |= dict(bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(**{**settings, **config})).eval()


def bert(seed: int = 0, **config: Any) -> nn.Module:
    """A BERT with a classification head of 3 classes: hidden 32, 2 layers."""
    from transformers import BertConfig, BertForSequenceClassification

    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_labels=3,
    )
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**settings, **config})).eval()


class ConvNet(nn.Module):
    """x (b, 3, 8, 8) -> (b, 5): 2-D convolutions with stride and padding, then a 1-D one over the
    flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.line = nn.Conv1d(12, 6, 5, stride=2, padding=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        h = torch.tanh(self.line(h.flatten(2)))
        y: Tensor = self.head(h.mean(-1))
        return y


def conv_net(seed: int = 0) -> nn.Module:
    """A small convolutional network that is no transformers model."""
    torch.manual_seed(seed)
    return ConvNet().eval()


def inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for one call of any of these models."""
    draw = torch.Generator().manual_seed(seed)
    if isinstance(model, ConvNet):
        return {"x": torch.randn(2, 3, 8, 8, generator=draw)}
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 7), generator=draw)}


@torch.no_grad()
def output(model: nn.Module, seed: int = 0) -> Tensor:
    """The model's logits (b, ..) on `inputs(model, seed)`; a wrapper around one of the models is asked for
    its own."""
    inner = getattr(getattr(model, "base_model", None), "model", model)  # PEFT's wrapper holds it there
    given = inputs(inner if isinstance(inner, ConvNet) else model, seed)
    y = model(**given)
    logits: Tensor = y if isinstance(y, Tensor) else y.logits
    return logits


@torch.no_grad()
def randomise(model: nn.Module, name: str = "default", seed: int = 1, size: float = 0.1) -> None:
    """Gives every trainable parameter of an attached adapter a random step, so that it changes something."""
    from veneer.adapt.attached import changes

    draw = torch.Generator().manual_seed(seed)
    for _, delta in changes(model, name):
        for p in delta.parameters():
            p.add_(size * torch.randn(p.shape, generator=draw).to(p))
