"""Measures the finished built-in model and writes its card, README.md.

python -m veneer.embedded.card src/veneer/embedded/model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from veneer.embedded import texts
from veneer.embedded.pretrain import bits_per_byte, token_stream

LENGTH = 512
NAMES = {
    "known": "held-out library modules (test)",
    "prose": "pydoc's topics, English prose (test)",
    "c": "CPython's C headers (test)",
}

CARD = """# The built-in model

A small language model of Python source, so that Veneer's main job runs with no download. It writes the
texture of Python (syntax, indentation, plausible names), not programs that work. Expect a HumanEval score
of zero. Use it to see adaptation happen, not to write code.

**Architecture.** {parameters:,} parameters: LlamaForCausalLM, hidden 256, 4 layers, 4 heads, MLP 704, tied
embeddings, context 512; byte-level BPE of {vocabulary} trained on the library part. bfloat16 safetensors.

**Data.** The source of CPython {python}'s standard library as installed: {library_documents} library files
({library_mb:.1f} MB) and {test_documents} files of its test packages ({test_mb:.1f} MB), drawn {weight:g}
to 1 by token. Excluded: `pydoc_data`, `encodings`, generated configuration, and the modules listed in
`heldout.txt`. Licence of the data: PSF License Version 2. The weights are Veneer's own, trained from
scratch by `python -m veneer.embedded.pretrain`; nothing was downloaded.

**Recipe.** {steps:,} steps of {batch} windows of {length} tokens ({tokens:.1f} M tokens, {minutes:.0f}
minutes on one shared CPU core), bfloat16 autocast. Muon for the matrices (rate {muon_lr:g}), AdamW for
embeddings and norms (rate {adam_lr:g}), 1 % warm-up, constant, linear decay to zero over the last
{decay:.0%}; seed {seed}. A resumed run continues with the same windows. The rate follows the clock, so two
runs are similar, not equal.

**Bits per byte**, in windows of {length_used} tokens, measured on the text of CPython {measured_python}:

| text | bits per byte |
|---|---|
{table}

Validation modules, used to choose the length of the run: {valid:.3f}. Lower is better. Texts of other
Python versions differ a little.

**Licence.** Apache-2.0, as Veneer's.
"""


def measure(folder: Path) -> dict[str, float]:
    """Returns bits per byte of the finished model on the test texts of this interpreter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    found = {}
    for name in NAMES:
        if name == "known" or texts.has(name):
            documents = texts.known("test") if name == "known" else texts.domain(name, "test")
            found[name] = bits_per_byte(
                model, token_stream(tokenizer, documents), texts.describe(documents)["bytes"], LENGTH
            )
    return found


def write(folder: Path) -> Path:
    """Measures the model, adds the figures to training.json and writes README.md; returns its path."""
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    facts["test_bpb"] = measure(folder)
    (folder / "training.json").write_text(
        json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recipe, data = facts["recipe"], facts["data"]
    card = CARD.format(
        parameters=4_262_144,
        vocabulary=config["vocab_size"],
        python=facts["python"],
        library_documents=data["library"]["documents"],
        library_mb=data["library"]["bytes"] / 1e6,
        test_documents=data["tests"]["documents"],
        test_mb=data["tests"]["bytes"] / 1e6,
        weight=recipe["library_weight"],
        steps=facts["step"],
        tokens=facts["tokens"] / 1e6,
        minutes=facts["seconds"] / 60,
        length_used=LENGTH,
        measured_python=sys.version.split()[0],
        table="\n".join(f"| {NAMES[n]} | {b:.3f} |" for n, b in facts["test_bpb"].items()),
        valid=facts["known_valid_bpb"],
        **{k: recipe[k] for k in ("batch", "length", "muon_lr", "adam_lr", "decay", "seed")},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder / "README.md"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
