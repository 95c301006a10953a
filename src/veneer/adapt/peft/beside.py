"""Reads weights that PEFT trains beside its targets: biases, rows of tokens, resized embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import methods
from veneer.adapt.attached import Changes
from veneer.adapt.peft.settings import PREFIX
from veneer.adapt.peft.targets import Config, ends
from veneer.adapt.peft.whole import equal, whole_module
from veneer.adapt.store.problems import Problem
from veneer.methods.base.biased import Biased
from veneer.methods.base.token_rows import TokenRows
from veneer.methods.lora import LoRA
from veneer.sites import BiasSite, LeafSite, Site, site_for
from veneer.sites.embedding import EmbeddingSite
from veneer.sites.finding.kinds import kind_of
from veneer.sites.own import base_modules
from veneer.sites.roles import embeddings

ROWS = "token_adapter.trainable_tokens_delta"


def _misfit(indices: Sequence[int], rows: Tensor, own: Tensor, key: str) -> str:
    """Returns the reason why rows of tokens do not fit the module's weight, or ""."""
    if below := [i for i in indices if i < 0]:
        return f"wrong token: {key} has rows of token {below[0]}; tokens are numbered from 0"
    if rows.shape == (len(indices), own.shape[1]) and all(i < len(own) for i in indices):
        return ""
    return (
        f"wrong shape: {key} is {tuple(rows.shape)} for {len(indices)} tokens, the model's rows are"
        f" {tuple(own.shape)}; resize its vocabulary first (model.resize_token_embeddings)"
    )


class Beside:
    """Reads the tensors beside the targeted layers' own; adds to `changes`, `used` and `problems`."""

    def __init__(
        self, model: nn.Module, tensors: Mapping[str, Tensor], changes: Changes, used: set[str]
    ) -> None:
        self.model, self.changes, self.used = model, changes, used
        self.tensors = {_plain(k): t for k, t in tensors.items()}
        self.keys = {_plain(k): k for k in tensors}
        self.problems: list[Problem] = []

    def _at(self, name: str) -> int | None:
        found = (i for i, (s, _) in enumerate(self.changes) if s.name == name)
        return next(found, None)

    @torch.no_grad()
    def low_rank_biases(self, config: Config) -> None:
        """lora_bias: y + s (B A x + b) at every targeted layer."""
        for i, (site, delta) in enumerate(self.changes):
            name = f"{site.name}.lora_B.bias"
            if not config.get("lora_bias") or isinstance(site, LeafSite):
                continue
            if name not in self.tensors or not isinstance(delta, LoRA):
                text = (
                    f"missing: {name}" if isinstance(delta, LoRA) else f"{name}: a bias beside another method"
                )
                self.problems.append(Problem("fit", f"{text}; merge the adapter in PEFT"))
                continue
            self.changes[i] = (site, Biased(site, delta, delta.scaling * self.tensors[name].to(delta.B)))
            self.used.add(self.keys[name])

    @torch.no_grad()
    def biases(self, config: Config) -> None:
        """bias: the base's own biases, of the targeted layers or of all modules."""
        if config.get("bias") in (None, "none"):
            return
        for name, module in base_modules(self.model).items():
            key, own = f"{name}.bias", module._parameters.get("bias")
            if own is None or key not in self.tensors or self.keys[key] in self.used:
                continue
            t = self.tensors[key]
            if t.shape != own.shape:
                text = f"wrong shape: {key} is {tuple(t.shape)}, the model's is {tuple(own.shape)}"
                self.problems.append(Problem("fit", text))
            elif not equal(t, own):
                self._shift(name, module, t.float() - own.float())
            self.used.add(self.keys[key])

    def _shift(self, name: str, module: nn.Module, b: Tensor) -> None:
        i = self._at(name)
        if i is not None:
            site, delta = self.changes[i]
            self.changes[i] = (site, Biased(site, delta, b))
            return
        site = BiasSite(name, module)
        delta = methods.build(methods.get("bitfit"), site, {})
        next(delta.parameters()).copy_(b)
        self.changes.append((site, delta))

    @torch.no_grad()
    def rows(self, config: Config) -> None:
        """Reads trainable_token_indices: absolute rows. A tied head shares the embedding's rows. Rows of the
        head alone do not change the embedding."""
        for entry, indices in _indices(self.model, config.get("trainable_token_indices")):
            for name, module in base_modules(self.model).items():
                key = f"{name}.{ROWS}"
                if not ends(name, [entry]):
                    continue
                if key not in self.tensors:
                    self.problems.append(Problem("fit", f"missing: {key} ({len(indices)}, ..)"))
                    continue
                self.used.add(self.keys[key])
                made: list[nn.Parameter] = []
                for site in self._sharing(name, module):
                    self._put_rows(site, indices, self.tensors[key], key, made)

    def _sharing(self, name: str, module: nn.Module) -> list[Site]:
        """Returns the sites of the module and, of an embedding, of those that share its weight."""
        weight = module._parameters.get("weight") if kind_of(module) is EmbeddingSite else None
        same = [(n, m) for n, m in base_modules(self.model).items() if m._parameters.get("weight") is weight]
        return [site_for(n, m) for n, m in same] if weight is not None else [site_for(name, module)]

    def _put_rows(
        self, site: Site, indices: Sequence[int], rows: Tensor, key: str, made: list[nn.Parameter]
    ) -> None:
        own = site.module.weight.detach()
        if text := _misfit(indices, rows, own, key):
            self.problems.append(Problem("fit", text))
            return
        chosen = torch.tensor(list(indices), device=own.device)
        change = rows.to(own.device, torch.float32) - own[chosen].float()  # (n, d)
        if not change.any():
            return
        i = self._at(site.name)
        if i is None:
            if not made:
                made.append(nn.Parameter(change))
            (shared,) = made
            self.changes.append((site, TokenRows(site, shared, indices)))
            return
        marks = torch.zeros(len(indices), len(own), device=own.device)
        marks[torch.arange(len(indices)), chosen] = 1
        # Embedding: W is (d, vocabulary), and W' - W = change' marks. Linear head: W' - W = marks' change.
        A, B = (marks, change.mT) if site.kind == "embedding" else (change, marks.mT)
        if isinstance(delta := self.changes[i][1], LoRA) and delta.A0 is None:
            joined = (
                torch.cat([delta.A, A.to(delta.A)]),
                torch.cat([delta.scaling * delta.B, B.to(delta.B)], 1),
            )
            self.changes[i] = (site, LoRA.holding(site, *joined, alpha=len(joined[0])))
        else:
            text = (
                f"{site.name}: rows of tokens were trained beside another change of this layer; merge in PEFT"
            )
            self.problems.append(Problem("fit", text))

    def embeddings(self) -> None:
        """Embeddings that PEFT saved whole because the vocabulary was resized: those that differ from the
        base's.
        """
        for name in _ends_of(self.model):
            module = self.model.get_submodule(name)
            keys = [f"{name}.{k}" for k, _ in module.named_parameters(recurse=False)]
            if any(k not in self.tensors or self.keys[k] in self.used for k in keys):
                continue
            own = {k: module.get_parameter(k.rpartition(".")[2]) for k in keys}
            fits = all(self.tensors[k].shape == p.shape for k, p in own.items())
            if fits and self._at(name) is None and not all(equal(self.tensors[k], p) for k, p in own.items()):
                given = {f"{PREFIX}{k}": self.tensors[k] for k in keys}
                self.changes += whole_module(self.model, name, given, set(), self.problems)
                self.used |= {self.keys[k] for k in keys}


def _plain(key: str) -> str:
    """Returns "model.q_proj.bias" for "base_model.model.model.q_proj.base_layer.bias"."""
    return key.removeprefix(PREFIX).replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def _indices(model: nn.Module, given: Any) -> Iterator[tuple[str, list[int]]]:
    """Yields ending of a module's name -> token ids. A bare list is for the input embedding."""
    if isinstance(given, Mapping):
        yield from ((str(name), [int(i) for i in ids]) for name, ids in given.items())
    elif given:
        inputs = embeddings(model, "input")
        names = [n for n, m in base_modules(model).items() if m is inputs]
        yield from ((n, [int(i) for i in given]) for n in names[:1] or ["embed_tokens"])


def _ends_of(model: nn.Module) -> list[str]:
    """Returns the names of the input and output embeddings."""
    own = [embeddings(model, end) for end in ("input", "output")]
    return [n for n, m in base_modules(model).items() if any(m is o for o in own)]
