"""Bodies of requests, with bounds on every size."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from veneer.serve.engine.request import MAX_BIASES, MAX_LOGPROBS, MAX_STOPS

Number = StrictInt | StrictFloat
Text = Annotated[StrictStr, Field(max_length=4 << 20)]
Token = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], Field(max_length=1 << 20)]
MOST_CHOICES = 32


class StreamOptions(BaseModel):
    """Extras of a stream."""

    model_config = ConfigDict(extra="ignore")
    include_usage: StrictBool = False


class Common(BaseModel):
    """Fields of both kinds of completion. Fields that change nothing in the answer are accepted and
    ignored.
    """

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(max_length=1024)] | None = None
    adapter_id: Annotated[StrictStr, Field(max_length=1024)] | None = None
    lora: Annotated[list[dict[str, Any]], Field(max_length=64)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    ignore_eos: StrictBool = False
    skip_special_tokens: StrictBool = True
    max_tokens: Annotated[StrictInt, Field(ge=0, lt=1 << 31)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(max_length=10)], Number], Field(max_length=MAX_BIASES)] | None
    ) = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[StrictStr, Field(max_length=1024)] | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: Annotated[StrictStr, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=1024)] | None = None
    safety_identifier: Annotated[StrictStr, Field(max_length=1024)] | None = None


class CompletionBody(Common):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(max_length=MOST_CHOICES)]
    best_of: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: None = None


class TextPart(BaseModel):
    """A part of a message's content; only text is understood."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["text"]
    text: Text


class Called(BaseModel):
    """The function of a tool call, and its arguments as JSON text or an object."""

    model_config = ConfigDict(extra="ignore")
    name: Annotated[StrictStr, Field(max_length=256)]
    arguments: Text | dict[str, Any]


class ToolCall(BaseModel):
    """A tool call of an earlier turn."""

    model_config = ConfigDict(extra="ignore")
    id: Annotated[StrictStr, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")
    role: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(max_length=256)] | None = None
    name: Annotated[StrictStr, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=64)] | None = None
    tool_call_id: Annotated[StrictStr, Field(max_length=256)] | None = None


class ResponseFormat(BaseModel):
    """Only plain text."""

    type: Literal["text"]


class ChatBody(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: StrictBool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter, as vLLM has it. lora_path: a folder under the adapters' root."""

    model_config = ConfigDict(extra="ignore")
    lora_name: Annotated[StrictStr, Field(max_length=256)]
    lora_path: Annotated[StrictStr, Field(max_length=1024)]
    load_inplace: StrictBool = False


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(extra="ignore")
    lora_name: Annotated[StrictStr, Field(max_length=256)]


class PinBody(BaseModel):
    """POST /v1/pin_lora_adapter."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[StrictStr, Field(max_length=256)]
    pinned: StrictBool = True


class TokenizeBody(BaseModel):
    """POST /tokenize: a text or a conversation."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(max_length=1024)] | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid")
    model: Annotated[StrictStr, Field(max_length=1024)] | None = None
    tokens: Tokens
