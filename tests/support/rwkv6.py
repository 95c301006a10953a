"""RWKV-6 as a small plain model (Peng et al. 2024, https://arxiv.org/abs/2404.05892, section 4, "Finch").

transformers has RWKV-4 alone. The recurrence follows the paper's formulas, one step at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIXED = ("decay", "key", "value", "receptance", "gate")


@dataclass
class Rwkv6Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    head_size: int
    intermediate_size: int
    mix_rank: int = 4
    decay_rank: int = 4


def shifted(x: Tensor) -> Tensor:
    """Returns x (b, t, d) one step later."""
    return F.pad(x, (0, 0, 1, -1))


class Rwkv6TimeMix(nn.Module):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.head_size
        self.start = nn.Parameter(torch.rand(d))
        self.mix = nn.Parameter(torch.rand(len(MIXED), d))
        self.mix_A = nn.Parameter(0.1 * torch.randn(d, len(MIXED) * config.mix_rank))
        self.mix_B = nn.Parameter(0.1 * torch.randn(len(MIXED), config.mix_rank, d))
        self.decay = nn.Parameter(torch.linspace(-5, 1, d))
        self.decay_A = nn.Parameter(0.1 * torch.randn(d, config.decay_rank))
        self.decay_B = nn.Parameter(0.1 * torch.randn(config.decay_rank, d))
        self.bonus = nn.Parameter(torch.randn(d // self.size, self.size))
        for name in MIXED[1:]:
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.output = nn.Linear(d, d, bias=False)
        self.norm = nn.GroupNorm(d // self.size, d, eps=64e-5)

    def mixed(self, x: Tensor) -> Tensor:
        """Returns x between its present and its last value, five ways: (5, b, t, d). Formulas 14 and 15."""
        change = shifted(x) - x
        low = torch.tanh((x + change * self.start) @ self.mix_A).unflatten(-1, (len(MIXED), -1))
        share = self.mix[:, None, None] + torch.einsum("btmr,mrd->mbtd", low, self.mix_B)
        return x + change * share

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        w, k, v, r, g = self.mixed(x).unbind()
        decay = torch.exp(-torch.exp(self.decay + torch.tanh(w @ self.decay_A) @ self.decay_B))
        k, v, r, decay = (
            y.view(b, t, -1, self.size) for y in (self.key(k), self.value(v), self.receptance(r), decay)
        )
        state, found = x.new_zeros(b, d // self.size, self.size, self.size), []
        for i in range(t):
            now = k[:, i, :, :, None] * v[:, i, :, None, :]
            found.append((r[:, i, :, None, :] @ (self.bonus[..., None] * now + state)).flatten(1))
            state = decay[:, i, :, :, None] * state + now
        y = self.norm(torch.stack(found, 1).flatten(0, 1)).view(b, t, d)
        out: Tensor = self.output(y * F.silu(self.gate(g)))
        return out


class Rwkv6ChannelMix(nn.Module):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.mix = nn.Parameter(torch.rand(2, d))
        self.key, self.value = nn.Linear(d, wide, bias=False), nn.Linear(wide, d, bias=False)
        self.receptance = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        change = shifted(x) - x
        k, r = (x + change * share for share in self.mix)
        out: Tensor = torch.sigmoid(self.receptance(r)) * self.value(F.relu(self.key(k)).square())
        return out


class Rwkv6Block(nn.Module):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention, self.feed_forward = Rwkv6TimeMix(config), Rwkv6ChannelMix(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln1(x))
        out: Tensor = x + self.feed_forward(self.ln2(x))
        return out


class Rwkv6ForCausalLM(nn.Module):
    def __init__(self, config: Rwkv6Config) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Rwkv6Block(config) for _ in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self.embeddings(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_out(x))
        found = SimpleNamespace(logits=logits)
        if labels is not None:
            found.loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return found
