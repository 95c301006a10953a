"""Describes the ways to use a saved adapter, as commands: only those that its files allow."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from veneer.adapt.store import manifest
from veneer.compress import quantise
from veneer.convert.dialects import vllm
from veneer.embedded import PREFIX
from veneer.errors import FormatError
from veneer.foreign import visible
from veneer.sites import changed

FOLDER = "$(python -c 'from veneer import embedded; print(embedded.folder())')"  # of the built-in model
SERVED = ("linear", "transposed", "embedding")  # kinds of layers that vLLM adapts

NEARLY = "on the plain one, and in other programs' formats, its outputs are nearly the same"
OURS = """With Veneer, in this folder:

```python
import veneer
from {library} import {auto}
{imports}
model = {auto}.from_pretrained({base}{head}){quantised}
veneer.load(model, "."{allow})  # veneer.using(model, {{"default": 0.75}}) dials it down
```"""

PEFT = """With PEFT, in this folder:

```python
from peft import PeftModel
from {library} import {auto}
{imports}
model = PeftModel.from_pretrained({auto}.from_pretrained({base}{head}), ".")
```"""

VLLM = """With vLLM, whose documented checks these files pass (it was not started here):

```
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=.
```"""


def quoted(text: str) -> str:
    """Returns a text as Python writes it in double quotes, on one line of a block of code."""
    return json.dumps(visible(text), ensure_ascii=False).replace("`", "\\x60")


def ways(
    model: str,
    auto: str,
    record: Mapping[str, Any],
    peft: Mapping[str, Any] | None,
    head: Mapping[str, Any] | None = None,
) -> list[str]:
    """Returns the ways to use an adapter of base `model`, which the class `auto` loads.

    record: veneer.json; peft: adapter_config.json, or None; head: arguments of the class for the task's head.
    """
    builtin = model == PREFIX
    library, _, name = auto.rpartition(".")
    given = {"library": library, "auto": name, "base": "embedded.folder()" if builtin else quoted(model)}
    given["head"] = "".join(f", {name}={value!r}" for name, value in (head or {}).items())
    given["imports"] = "\nfrom veneer import embedded\n" if builtin else ""
    allow = f", allow={record['allow']!r}" if record["allow"] else ""
    own = record["options"].get("init") in quantise.STARTS
    packed = changed.recorded(record["base"]).get("quantised", [])
    quantised = (
        '\nveneer.load_quantised(model, "../base")'
        if own
        else f"\nveneer.quantise(model, {packed[0]!r})"
        if packed
        else ""
    )
    found = [OURS.format(**given, allow=allow, quantised=quantised)]
    if own:
        return [
            *found,
            "Its base is quantised around its start: other programs need the model that `veneer merge`"
            " writes.",
        ]
    if record["layout"] != manifest.PEFT or peft is None:
        return [*found, f"PEFT cannot express this change; {_otherwise(model, record)}"]
    found.append(PEFT.format(**given))
    found.append(_vllm(model, record, peft))
    near = f"It was trained on a base in {' and '.join(packed)}: {NEARLY}."
    return [*found, near] if packed else found


def _vllm(model: str, record: Mapping[str, Any], peft: Mapping[str, Any]) -> str:
    sites = record["sites"].values()
    odd = sorted({s["kind"] for s in sites} - set(SERVED))
    if odd:
        return f"vLLM cannot adapt layers of the kind {', '.join(odd)}, which this adapter changes."
    if peft["peft_type"] != "LORA" or peft.get("use_dora") or peft.get("modules_to_save"):
        return f"vLLM reads plain LoRA alone; {_otherwise(model, record)}"
    try:
        rank = vllm.legal_rank(max(s["rank"] for s in sites))
    except FormatError as e:
        return f"vLLM cannot serve it unchanged: {e}."
    return VLLM.format(base=FOLDER if model == PREFIX else shlex.quote(model), rank=rank)


def _otherwise(model: str, record: Mapping[str, Any]) -> str:
    """Returns the command that converts the change for other programs."""
    sites, base = record["sites"].values(), shlex.quote(model)
    if any(s["norm"] is None for s in sites):
        return "it changes no weights, and works in Veneer only."
    if any(s["kind"] not in SERVED for s in sites):
        return (
            f"`veneer merge . --model {base} --out merged` writes it into a copy of the base for any program."
        )
    plain = "makes plain LoRA of it for PEFT and vLLM, and reports the loss."
    return f"`veneer combine . --model {base} --rank 64 --out plain` {plain}"
