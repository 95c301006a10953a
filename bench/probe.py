"""Plants 1,000 faults in adapters on models of 8 to 80 blocks, and loads 1,000 sound ones, in all precisions.

Faults are those that names and hashes do not show: another base, a layer without its change, another scale.
A sound load may differ from the save in precision, attention and compiler. Counted are the faults that
`veneer.load` refuses, and the sound loads that it refuses. `probe_alone` counts the faults that the golden
probe sees by itself where nothing else looks: in the running model, in float32.

    python bench/probe.py [loads]
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import _measure as m
import torch

DEPTHS = (8, 12, 16, 24, 30, 48, 80)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTIONS = ("sdpa", "eager")
FAULTS = ("wrong base", "dropped layer", "wrong scale")
LOADS, EACH = 1000, 10  # of each kind, and of one adapter
COUNTS = ("sound_loads", "false_alarms", "faults", "faults_found", "probe_alone", "probe_alone_found")
COMPILED = 12  # blocks up to which some loads are compiled
TENSORS = "adapter_model.safetensors"


class Place(NamedTuple):
    """One side of a save and a load: how the base is held."""

    depth: int
    dtype: torch.dtype
    attention: str


class Bases:
    """Random Llamas by depth and seed; the same weights in every precision."""

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}

    def get(self, at: Place, seed: int) -> Any:
        """Returns the base without an adapter; the last few are kept."""
        key = (*at, seed)
        if key not in self.made:
            if len(self.made) > 8:
                self.made.clear()
            self.made[key] = build(at, seed)
        return self.made[key]


def build(at: Place, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=at.depth,
        attn_implementation=at.attention,
    )
    return LlamaForCausalLM(config).eval().to(at.dtype)


def saved(base: Any, folder: Path, size: float, seed: int) -> None:
    """Writes an adapter of random numbers, whose change of a layer has about this norm per input."""
    import veneer
    from veneer.adapt.attached import changes

    veneer.attach(base, "lora", to=["q_proj", "v_proj", "down_proj"], rank=2)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, delta in changes(base, "default"):
            delta.A.copy_(torch.randn(delta.A.shape, generator=draw))
            delta.B.copy_(torch.randn(delta.B.shape, generator=draw) * size / delta.A.shape[1] ** 0.5)
    veneer.save(base, folder)
    veneer.detach(base)


def loads(base: Any, folder: Path, *, compiled: bool = False) -> str | None:
    """Returns the first line of a refusal, or None for a load that succeeds; takes the adapter off again."""
    import veneer
    from veneer.errors import FormatError

    if compiled:
        for block in base.model.layers:
            block.compile(backend="eager")
    try:
        veneer.load(base, folder)
    except FormatError as e:
        return str(e).splitlines()[-1]
    finally:
        if veneer.adapters(base):
            veneer.detach(base)
        for block in base.model.layers if compiled else ():
            block._compiled_call_impl = None
    return None


def spoil(folder: Path, fault: str, draw: random.Random) -> None:
    """Changes the adapter's numbers, and vouches for them by a new hash."""
    from safetensors.torch import load_file, save_file

    from veneer import files

    tensors = load_file(folder / TENSORS)
    names = sorted(n for n in tensors if n.endswith("lora_B.weight"))
    if fault == "dropped layer":
        block = draw.choice(names).split(".layers.")[1].split(".")[0]
        for n in (n for n in names if f".layers.{block}." in n):
            tensors[n] = tensors[n] * 0
    elif fault == "wrong scale":
        factor = draw.choice([0.5, 0.9, 1.1, 2.0, -1.0])
        tensors |= {n: tensors[n] * factor for n in names}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / TENSORS, {"format": "pt"})
    record = json.loads((folder / "veneer.json").read_text(encoding="utf-8"))
    record["tensors"]["sha256"] = files.sha256(folder / TENSORS)
    (folder / "veneer.json").write_text(json.dumps(record), encoding="utf-8")


def alone(base: Any, folder: Path, fault: str, draw: random.Random) -> bool:
    """Returns True if the probe sees the fault in the running model, which no file shows."""
    import veneer
    from veneer.adapt import probe
    from veneer.adapt.attached import changes

    model = veneer.load(base, folder)
    kept = json.loads((folder / "veneer.json").read_text(encoding="utf-8"))["probe"]
    every = [delta for _, delta in changes(model, "default")]
    with torch.no_grad():
        hit = every if fault == "wrong scale" else [every[draw.randrange(len(every))]]
        for delta in hit:
            delta.B.mul_(draw.choice([0.5, 2.0]) if fault == "wrong scale" else 0)
    found = bool(probe.check(model, probe.through(model, "default"), kept))
    veneer.detach(model)
    return found


def counted(wanted: int) -> Counter[str]:
    """Returns the counts of `wanted` loads of each kind."""
    draw, bases, counts = random.Random(0), Bases(), Counter(dict.fromkeys(COUNTS, 0))
    for group in itertools.count():
        if min(counts["faults"], counts["sound_loads"]) >= wanted:
            return counts
        depth = DEPTHS[group % len(DEPTHS)]
        size, seed = draw.choice([0.01, 0.05, 0.3]), draw.randrange(1 << 20)
        place = Place(depth, draw.choice(DTYPES), draw.choice(ATTENTIONS))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "a"
            saved(bases.get(place, seed), folder, size, seed + 1)
            for i in range(min(EACH, wanted - counts["sound_loads"])):
                now = Place(depth, DTYPES[i % 3], ATTENTIONS[i % 2])
                compiled = depth <= COMPILED and i == 0 and group % 4 == 0
                refusal = loads(bases.get(now, seed), folder, compiled=compiled)
                counts.update(sound_loads=1, false_alarms=refusal is not None)
                if refusal:
                    print("false alarm", place, now, size, refusal, file=sys.stderr, flush=True)
            for fault in FAULTS[1:] if place.dtype == torch.float32 else ():
                plain = Place(depth, torch.float32, place.attention)
                seen = alone(bases.get(plain, seed), folder, fault, draw)
                counts.update(probe_alone=1, probe_alone_found=seen)
            counts.update(planted(folder, depth, seed, min(EACH, wanted - counts["faults"]), bases, draw))
    raise AssertionError("unreachable")


def planted(folder: Path, depth: int, seed: int, n: int, bases: Bases, draw: random.Random) -> Counter[str]:
    """Plants n faults in the adapter, one at a time, and counts those that a load refuses."""
    whole, counts = {p.name: p.read_bytes() for p in folder.iterdir()}, Counter[str]()
    for i in range(n):
        fault, now = FAULTS[i % 3], Place(depth, DTYPES[(i // 3) % 3], ATTENTIONS[i % 2])
        if fault != "wrong base":
            spoil(folder, fault, draw)
        found = loads(bases.get(now, seed + (fault == "wrong base")), folder)
        counts.update(faults=1, faults_found=found is not None)
        if not found:
            print("missed", fault, now, file=sys.stderr, flush=True)
        for name, content in whole.items():
            (folder / name).write_bytes(content)
    return counts


def main() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # of blocks that compile again for an adapter
    torch.set_num_threads(1)
    total = counted(int(sys.argv[1]) if len(sys.argv) > 1 else LOADS)
    return m.report("probe", {k: float(total[k]) for k in COUNTS})


if __name__ == "__main__":
    main()
