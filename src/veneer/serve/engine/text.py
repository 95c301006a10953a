"""Tokens into text as they come: whole characters only, and nothing that a stop text may still cut off."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.data.tokenizer import Tokenizer

REPLACEMENT = "�"
HELD = 8  # tokens after which an incomplete character is passed on


class Detokeniser:
    """The text of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, special: bool = False) -> None:
        """special: keep special tokens in the text."""
        self.tokenizer, self.stops, self.special = tokenizer, tuple(stops), special
        self.tokens: list[int] = []
        self.text = ""
        self.sent = 0
        self._prefix, self._read = 0, 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token. Returns the text that became certain; `stopped` is then True if a stop text was
        reached.
        """
        self.tokens.append(token)
        before = self._decode(self.tokens[self._prefix : self._read])
        after = self._decode(self.tokens[self._prefix :])
        incomplete = after.endswith(REPLACEMENT) and len(self.tokens) - self._read < HELD
        if incomplete or len(after) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self.tokens)
        return self._passed(after[len(before) :])

    def finish(self) -> str:
        """Returns the rest of the text, which was held back."""
        if self.stopped:
            return ""
        before = self._decode(self.tokens[self._prefix : self._read])
        rest = self._decode(self.tokens[self._prefix :])[len(before) :]
        self._prefix, self._read = self._read, len(self.tokens)
        return self._passed(rest, last=True)

    def _passed(self, new: str, *, last: bool = False) -> str:
        begin = max(self.sent, len(self.text) - max(map(len, self.stops), default=0))
        self.text += new
        hits = [at for stop in self.stops if (at := self.text.find(stop, begin)) >= 0]
        if hits:
            self.text, self.stopped = self.text[: min(hits)], True
            return self._until(len(self.text))
        return self._until(len(self.text) - (0 if last else self._held()))

    def _until(self, end: int) -> str:
        found = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return found

    def _held(self) -> int:
        """Returns the length of the longest ending that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for n in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-n:]) for stop in self.stops if len(stop) > n):
                return n
        return 0

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False
            )
        )
