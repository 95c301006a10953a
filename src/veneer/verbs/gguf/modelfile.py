"""Writes an Ollama Modelfile: the file of weights, the chat template, and where an answer stops.

https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import json

from veneer.data.chat import templates
from veneer.data.chat.rendering import failures
from veneer.data.tokenizer import Tokenizer
from veneer.data.tokens import beginning

SYSTEM, PROMPT = "\ue010", "\ue011"


def text(tokenizer: Tokenizer, file: str) -> str:
    """Returns the Modelfile for a GGUF file beside it."""
    lines = [f"FROM ./{file}", f'TEMPLATE """{template(tokenizer)}"""']
    lines += [f"PARAMETER stop {json.dumps(tokenizer.eos_token)}"] if tokenizer.eos_token else []
    return "\n".join(lines) + "\n"


def template(tokenizer: Tokenizer) -> str:
    """Returns Ollama's template of one question, with a system message or without."""
    plain = _around(tokenizer, [{"role": "user", "content": PROMPT}])
    try:
        ruled = _around(
            tokenizer, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
        )
    except failures():  # a template without system messages
        return f"{plain[0]}{{{{ .Prompt }}}}{plain[1]}"
    head, found, middle = ruled[0].partition(SYSTEM)
    if not found:
        return f"{plain[0]}{{{{ .Prompt }}}}{plain[1]}"
    opening = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{middle}{{{{ else }}}}{plain[0]}{{{{ end }}}}"
    return f"{opening}{{{{ .Prompt }}}}{plain[1]}"


def _around(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> tuple[str, str]:
    """Returns the text before and after the prompt, without the beginning token, which Ollama adds."""
    own = tokenizer.chat_template or templates.packaged(templates.PLAIN, tokenizer)
    whole = templates.rendered(messages, tokenizer, own if isinstance(own, str) else None)
    if beginning(tokenizer):
        whole = whole.removeprefix(tokenizer.bos_token or "")
    before, _, after = whole.partition(PROMPT)
    return before, after
