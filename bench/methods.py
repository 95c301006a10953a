"""Times each method's training step and its kept bytes, against plain LoRA and against PEFT.

    python bench/methods.py [method ..] [--write]

A Llama of four layers (hidden 512, vocabulary 2048, bfloat16), two windows of 256 tokens, all linear layers
unless the method chooses otherwise, the same loss and optimiser on both sides, PEFT at its default. Kept
bytes are what a forward pass keeps for its backward, less what the model without adapters keeps. Merged
models are timed against the base, and a bottleneck adapter against a merged LoRA at batch 1. A contest takes
as many steps of each in turns as fit into its seconds, 9 at least and 51 at most.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _measure as m
import torch

import veneer
from veneer.adapt.acting.shared_inputs import discover

ROWS, LENGTH, VOCABULARY = 2, 256, 2048
# of the processor for a contest with PEFT, without; steps of each side
SECONDS, ALONE, FEWEST, MOST = (16.0, 6.0, 9, 51)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Contest(NamedTuple):
    """A method with its options, and PEFT's class and arguments of the same method, or None."""

    method: str
    options: dict[str, Any]
    peer: tuple[str, dict[str, Any]] | None = None


LORA = {"r": m.RANK, "lora_alpha": m.ALPHA}
OURS = {"rank": m.RANK, "alpha": float(m.ALPHA)}
CONTESTS = {
    "lora": Contest("lora", OURS, ("LoraConfig", LORA)),
    "dora": Contest("dora", OURS, ("LoraConfig", {**LORA, "use_dora": True})),
    "dora_dropout": Contest(
        "dora", {**OURS, "dropout": 0.05}, ("LoraConfig", {**LORA, "use_dora": True, "lora_dropout": 0.05})
    ),
    "miss": Contest("miss", {"rank": 32}, ("MissConfig", {"r": 32})),
    "miss_same_rank": Contest("miss", {"rank": m.RANK}, ("MissConfig", {"r": m.RANK})),
    "miss_mini": Contest(
        "miss", {"rank": 32, "mini": 64}, ("MissConfig", {"r": 32, "mini_r": 64, "init_weights": "mini"})
    ),
    "bat": Contest("bat", {"rank": 32}, ("MissConfig", {"r": 32, "init_weights": "bat"})),
    "fourierft": Contest("fourierft", {}, ("FourierFTConfig", {"init_weights": True})),
    "fourierft_grid": Contest("fourierft", {"grid": True}),
    "vera": Contest("vera", {}, ("VeraConfig", {})),
    "ia3": Contest("ia3", {}, ("IA3Config", {"feedforward_modules": ["down_proj"]})),
    "prefix": Contest("prefix", {"length": 16}, ("PrefixTuningConfig", {"num_virtual_tokens": 16})),
    "loldu": Contest("loldu", {}),
    "loraxs": Contest("loraxs", {}),
    "bitfit": Contest("bitfit", {"to": "all-linear"}),
    "bottleneck": Contest("bottleneck", {}),
    "flora": Contest("flora", {}),
    "flora_rank4": Contest("flora", {"rank": 4}),
    "full": Contest("full", {}),
}


def base() -> Any:
    m.SIZES["methods"] = {**m.SIZES["h512"], "num_hidden_layers": 4}
    return m.llama("methods", VOCABULARY, torch.bfloat16)


def batch() -> dict[str, torch.Tensor]:
    return m.random_batch(ROWS, LENGTH, VOCABULARY)


def ours(contest: Contest) -> Any:
    """Returns the model with our change, its layers that share an input grouped."""
    model = veneer.attach(base(), contest.method, **contest.options)
    with discover(model):
        model(**batch()).loss.backward()
    return model


def peers(contest: Contest) -> Any:
    """Returns the same by PEFT."""
    import peft

    assert contest.peer is not None
    name, settings = contest.peer
    to = ["k_proj", "v_proj", "down_proj"] if contest.method == "ia3" else ALL
    targets = {} if contest.method == "prefix" else {"target_modules": to}
    return peft.get_peft_model(base(), getattr(peft, name)(task_type="CAUSAL_LM", **targets, **settings))


def step_of(model: Any) -> m.Step:
    adam = m.optimiser(model, fused=True)
    texts = batch()
    return lambda: m.peer_step(model, adam, texts)


def kept(model: Any) -> int:
    """Returns bytes that one forward pass keeps, without parameters and buffers, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**batch()).loss
    total = sum(found.values())
    del loss
    return total


def frozen_but_passing() -> Any:
    """Returns the base as every adapter needs it: nothing trains, but gradients pass through all layers."""
    model = base().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
    return model


def in_turns(steps: dict[str, m.Step]) -> dict[str, float]:
    """Returns median processor seconds of each; short steps are repeated more often, for precision."""
    round_ = sum(m.interleaved(steps, repeats=1).values())
    seconds = SECONDS if "peft" in steps else ALONE
    return m.interleaved(steps, repeats=int(min(MOST, max(FEWEST, seconds / round_))), warm=0)


def of_methods(names: list[str]) -> dict[str, float]:
    """Returns every method's step against LoRA's and against PEFT's."""
    figures: dict[str, float] = {}
    nothing, lora = kept(frozen_but_passing()), ours(CONTESTS["lora"])
    lora_kept = kept(lora) - nothing
    for name in names:
        contest = CONTESTS[name]
        own = ours(contest)
        steps = {"lora": step_of(lora), "veneer": step_of(own)}
        own_kept = kept(own) - nothing
        figures[f"{name}_kept_vs_lora"] = own_kept / lora_kept
        if contest.peer:
            theirs = peers(contest)
            steps["peft"] = step_of(theirs)
            their_kept = kept(theirs) - nothing
            if their_kept > 0.05 * lora_kept:  # less is within what the two models differ by elsewhere
                figures[f"{name}_kept_vs_peft"] = own_kept / their_kept
        seconds = in_turns(steps)
        figures[f"{name}_time_vs_lora"] = seconds["veneer"] / seconds["lora"]
        if contest.peer:
            figures[f"{name}_vs_peft"] = seconds["peft"] / seconds["veneer"]
        print(name, {k: f"{1000 * v:.0f} ms" for k, v in seconds.items()}, file=sys.stderr, flush=True)
    return figures


def passing(model: Any, length: int) -> m.Step:
    """Forward passes of one window, as one adds up the latency of a request."""
    model.eval()
    ids = m.random_batch(1, length, VOCABULARY)["input_ids"]

    @torch.no_grad()
    def act() -> None:
        for _ in range(4):
            model(ids)

    return act


def of_latency() -> dict[str, float]:
    """Merged changes over the base, and a bottleneck over a merged LoRA, at batch 1."""
    merged: dict[str, Callable[[], Any]] = {"base": passing(base(), 128)}
    for name in ("lora", "miss", "bat", "fourierft", "ia3"):
        model = veneer.attach(base(), CONTESTS[name].method, **CONTESTS[name].options)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(0.02 * torch.randn_like(p))
        veneer.merge(model, probe={}, force=True)
        merged[name] = passing(model, 128)
    seconds = m.interleaved({**merged, "bottleneck": passing(ours(CONTESTS["bottleneck"]), 128)}, repeats=15)
    print({k: f"{250 * v:.2f} ms a window" for k, v in seconds.items()}, file=sys.stderr)
    short = {"lora": passing(base(), 1), "bottleneck": passing(ours(CONTESTS["bottleneck"]), 1)}
    token = m.interleaved(short, repeats=15)
    figures = {
        f"{name}_merged_over_base": seconds[name] / seconds["base"] for name in merged if name != "base"
    }
    figures["bottleneck_over_merged_lora_128_tokens"] = seconds["bottleneck"] / seconds["lora"]
    return figures | {"bottleneck_over_merged_lora_1_token": token["bottleneck"] / token["lora"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=[*CONTESTS])
    parser.add_argument("--write", action="store_true", help="keep the line in bench/results")
    args = parser.parse_args()
    figures = of_methods(args.methods)
    against = {k: v for k, v in figures.items() if k.endswith("_vs_peft") and "_kept_" not in k}
    if against:
        figures["slowest_vs_peft"] = min(against.values())
    if "miss" in args.methods:
        figures["miss_saved_memory_vs_lora"] = figures["miss_kept_vs_lora"]
    if len(args.methods) == len(CONTESTS):
        figures |= of_latency()
    line = m.report("methods", figures)
    if args.write:
        (Path(__file__).parent / "results" / "methods.json").write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
