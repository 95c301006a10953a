"""Bodies into prompts and sampling: what a request asks of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from veneer.data.chat import rendering, templates
from veneer.data.chat.limits import limited
from veneer.data.tokenizer import Tokenizer
from veneer.errors import DataError
from veneer.serve.adapters.expression import Named
from veneer.serve.engine.request import Sampling
from veneer.serve.errors import RequestError
from veneer.serve.http.fields import ChatBody, Common, CompletionBody, Message
from veneer.serve.http.streams import Ask
from veneer.serve.server import Server

COMPLETION_TOKENS = 16  # OpenAI's default for completions


def named(server: Server, body: Common) -> Named:
    """Returns the adapters of a body: of `model`, LoRAX's `adapter_id`, or the `lora` list."""
    if body.adapter_id and body.model not in (None, "", server.name, body.adapter_id):
        raise RequestError(
            "model and adapter_id name different adapters; send one of them", param="adapter_id"
        )
    return server.named(body.adapter_id or body.model, body.lora)


def of_completion(server: Server, body: CompletionBody) -> list[Ask]:
    """Returns one ask for each prompt and choice, prompt by prompt."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError(
            f"best_of must equal n, got {body.best_of}; choose among n answers yourself", param="best_of"
        )
    n = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if n == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    prompts = [_tokens(server, p) for p in _prompts(body.prompt)]
    scored = bool(body.echo) and body.logprobs is not None
    return _each(body, prompts, n, body.logprobs, scored)


def _prompts(prompt: Any) -> list[Any]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise RequestError("prompt must have at least one text or token", param="prompt")
    return list(prompt)


def _tokens(server: Server, prompt: Any) -> list[int]:
    if prompt == "":
        start = server.tokenizer.bos_token_id
        start = server.tokenizer.eos_token_id if start is None else start
        if start is None:
            raise RequestError("prompt must not be empty: the tokenizer lacks a first token", param="prompt")
        return [start]
    return server.tokens(prompt)


def of_chat(server: Server, body: ChatBody) -> list[Ask]:
    """Returns one ask for each choice."""
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    own = server.template(named(server, body))
    prompt = conversation(server.tokenizer, body.messages, body.tools, own)
    room = server.context - len(prompt)
    given = body.max_completion_tokens or body.max_tokens
    n = max(1, min(server.options.max_tokens, room)) if given is None else given
    return _each(body, [prompt], n, (body.top_logprobs or 0) if body.logprobs else None, False)


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Any = None, own: str | None = None
) -> list[int]:
    """Returns the tokens of a conversation that the assistant goes on with.

    own: the chat template of the adapter; else the tokenizer's is used, or the plain one. Raises RequestError
    for messages that the template refuses.
    """
    template = own or tokenizer.chat_template or templates.packaged(templates.PLAIN, tokenizer)
    if isinstance(template, dict):
        template = tokenizer.get_chat_template(None, tools)
    found = _in_a_form(tokenizer, [_turn(m) for m in messages], tools, template)
    if isinstance(found, Exception):
        why = str(found)[:200] or type(found).__name__
        raise RequestError(f"the chat template refuses these messages: {why}", param="messages")
    return found


def _in_a_form(
    tokenizer: Tokenizer, turns: list[dict[str, Any]], tools: Any, template: str
) -> list[int] | Exception:
    """Returns the tokens of the first form that the template takes, or the first refusal."""
    refusal: Exception | None = None
    try:
        with limited(template):
            for form in rendering.forms(turns, template):
                try:
                    text = tokenizer.apply_chat_template(
                        form, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
                    )
                    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                    return ids
                except Exception as e:  # templates fail in ways of their own
                    refusal = refusal or e
    except DataError as e:
        return e
    return refusal or ValueError("the template takes no form of them")


def _turn(m: Message) -> dict[str, Any]:
    content = m.content if isinstance(m.content, str | None) else "".join(part.text for part in m.content)
    more = {k: v for k in ("name", "tool_call_id") if (v := getattr(m, k)) is not None}
    if m.tool_calls is not None:
        more["tool_calls"] = [call.model_dump(exclude_none=True) for call in m.tool_calls]
    return {"role": m.role, "content": content or "", **more}


def _each(
    body: Common, prompts: Sequence[list[int]], max_tokens: int, logprobs: int | None, scored: bool
) -> list[Ask]:
    n = body.n or 1
    asks = []
    for prompt in prompts:
        for k in range(n):
            seed = None if body.seed is None else body.seed + k
            asks.append(Ask(prompt, sampling(body, max_tokens, seed, logprobs, scored)))
    return asks


def sampling(body: Common, max_tokens: int, seed: int | None, logprobs: int | None, scored: bool) -> Sampling:
    """Returns the sampling of a body, with OpenAI's defaults. Raises RequestError for a key of logit_bias
    that is not a number.
    """
    try:
        biases = {int(k): float(v) for k, v in (body.logit_bias or {}).items()}
    except ValueError:
        raise RequestError("logit_bias must map token numbers to biases", param="logit_bias") from None
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        seed=seed,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=biases,
        stop=stop,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=scored,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
