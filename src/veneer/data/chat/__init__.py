"""Turns rows into parts: text that is learned and text that is only read; conversations by chat templates."""

from veneer.data.chat.masks import ASSISTANT, Part, examples, parts

__all__ = ["ASSISTANT", "Part", "examples", "parts"]
