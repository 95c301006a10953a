"""The part of a tokenizer that Veneer uses; transformers' tokenizers have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Turns text into token ids and back; ids and strings of missing special tokens are None."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: Any  # a string, a mapping of strings by name, or None
    all_special_tokens: list[str]
    special_tokens_map: Mapping[str, Any]
    is_fast: bool
    all_special_ids: list[int]

    def __call__(self, text: Any, /, **options: Any) -> Any:
        """Returns input_ids and more, by name."""

    def __len__(self) -> int:
        """Returns the number of tokens in the vocabulary, added ones included."""

    def encode(self, text: str, /, **options: Any) -> list[int]:
        """Returns the token ids of a text."""

    def decode(self, ids: Any, /, **options: Any) -> str:
        """Returns the text of token ids."""

    def convert_tokens_to_ids(self, tokens: Any, /) -> Any:
        """Returns the id of a token, or the ids of tokens."""

    def get_vocab(self) -> Mapping[str, int]:
        """Returns the ids by token."""

    def get_chat_template(self, *args: Any, **options: Any) -> str:
        """Returns the template that `apply_chat_template` would use. Raises ValueError without one."""

    batch_decode: Callable[..., list[str]]
    apply_chat_template: Callable[..., Any]
    save_pretrained: Callable[..., Sequence[str]]
