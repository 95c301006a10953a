"""How a saved adapter is used, as commands: only the ways that its files really allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.adapt import manifest
from veneer.convert import vllm
from veneer.embedded import PREFIX
from veneer.errors import FormatError

SERVED = ("linear", "transposed", "embedding")  # kinds of layers that vLLM adapts

OURS = """With Veneer, in this folder:

```python
import veneer
from transformers import AutoModelForCausalLM
{imports}
model = AutoModelForCausalLM.from_pretrained({base})
veneer.load(model, "."{allow})  # veneer.using(model, {{"default": 0.75}}) dials it down
```"""

PEFT = """With PEFT, in this folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{imports}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), ".")
```"""

VLLM = """With vLLM, whose documented checks these files pass (it was not started here):

```
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=.
```"""


def ways(model: str, record: Mapping[str, Any], peft: Mapping[str, Any] | None) -> list[str]:
    """The ways for an adapter of base `model`. record: veneer.json; peft: adapter_config.json, or None."""
    builtin = model == PREFIX
    base = "embedded.folder()" if builtin else f'"{model}"'
    imports = "\nfrom veneer import embedded\n" if builtin else ""
    allow = f", allow={record['allow']!r}" if record["allow"] else ""
    found = [OURS.format(base=base, imports=imports, allow=allow)]
    if record["layout"] != manifest.PEFT or peft is None:
        return [*found, f"PEFT has no words for this change; {_converted(record, model)}"]
    found.append(PEFT.format(base=base, imports=imports))
    return [*found, _vllm("the built-in model's folder" if builtin else model, record, peft)]


def _vllm(base: str, record: Mapping[str, Any], peft: Mapping[str, Any]) -> str:
    sites = record["sites"].values()
    odd = sorted({s["kind"] for s in sites} - set(SERVED))
    if odd:
        return f"vLLM adapts no layers of the kind {', '.join(odd)}, which this adapter changes."
    if peft["peft_type"] != "LORA" or peft.get("use_dora") or peft.get("modules_to_save"):
        return f"vLLM reads plain LoRA alone; {_converted(record, base)}"
    try:
        rank = vllm.legal_rank(max(s["rank"] for s in sites))
    except FormatError as e:
        return f"Not with vLLM as it is: {e}."
    return VLLM.format(base=base if " " not in base else "BASE", rank=rank)


def _converted(record: Mapping[str, Any], base: str) -> str:
    if any(s["kind"] not in SERVED for s in record["sites"].values()):
        return "`veneer merge` writes it into a copy of the base, which any program reads."
    model = base if " " not in base else PREFIX
    return f"`veneer convert . --model {model} --to vllm --rank 64 --out served` makes plain LoRA of it, and says what that loses."
