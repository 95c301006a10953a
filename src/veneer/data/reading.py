"""Settings of data: which texts a run names, and how a text is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from veneer.data.chat import templates
from veneer.data.forms import shape
from veneer.data.forms.shape import Shape, template_of
from veneer.errors import ConfigError, option
from veneer.settings import REQUIRED, Range, Settings, about, setting

AUTO: Literal["auto"] = "auto"
NO_TEXT = "none"  # as `known`: forgetting is not measured; as `valid`: all of data is learned


@dataclass(frozen=True, kw_only=True)
class Texts(Settings):
    """The texts of a run, by the part each plays."""

    PANEL = "Data"

    data: tuple[str, ...] = setting(
        REQUIRED,
        "texts to learn from: files (.txt, .jsonl, .csv, .parquet, ..), datasets, builtin:prose;"
        " NAME@2: twice an epoch",
    )
    valid: tuple[str, ...] = setting(
        (),
        "texts to choose the best step by; a tenth of data unless given; none: learn all, keep the last step",
    )
    test: tuple[str, ...] = setting(
        (), "texts measured before and after training only; results are valid's without them"
    )
    known: tuple[str, ...] = setting(
        (), "texts to measure forgetting on; none: no text; builtin:known for the built-in model"
    )
    stream: bool = setting(
        False, "read data row by row while training, without holding all of it; needs steps"
    )
    buffer: int = setting(1024, "windows of a stream to hold and draw the next one from", unit="windows")

    @property
    def chooses(self) -> bool:
        """Tells if the best step is chosen; without valid text the last step is kept."""
        return self.valid != (NO_TEXT,)

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        yield from Range("1 or more", ("buffer",), 1).problems(self)
        if not self.data:
            data = option("data")
            yield f"{data} must name a text, got none; give files (.txt, .jsonl), builtin:prose or builtin:c"
        if self.buffer != Texts.buffer and not self.stream:
            stream, buffer = option("stream", True), option("buffer")
            yield f"{buffer} {self.buffer} applies to a stream only; set {stream}, or leave {buffer} out"
        for name in ("valid", "known"):
            given = getattr(self, name)
            if NO_TEXT in given and len(given) > 1:
                others = ", ".join(k for k in given if k != NO_TEXT)
                yield f"{option(name)} must be {NO_TEXT!r} or texts, got both ({others}); give one of them"


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """Rules by which rows become examples; enough to read a text without a run."""

    PANEL = "Data"

    length: int | Literal["auto"] = setting(
        AUTO, "longest window; auto: from the rows and the model's context", unit="tokens"
    )
    overlong: Literal["drop", "cut", "error"] = setting(
        "drop", "rows longer than length: leave them out, cut their ends off, or stop"
    )
    empty: Literal["drop", "error"] = setting(
        "drop", "rows without anything to learn: leave them out, or stop"
    )
    packing: bool = setting(True, "put several short texts into one window, hidden from each other")
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata=about("columns of tables to use, as prompt=question,completion=answer; a.b looks inside"),
    )
    prompt_template: str | None = setting(
        None, "prompt written from columns, as 'Q: {question}\\nA:', or a file of such text"
    )
    special_tokens: Literal["parse", "spell", "refuse"] = setting(
        "parse", "names of special tokens in texts and pairs: read as these tokens, spelt out, or refused"
    )
    train_on: Literal["completion", "all"] = setting(
        "completion", "learn completions and assistant turns, or all of each text"
    )
    train_roles: tuple[str, ...] = setting(("assistant",), "roles of a conversation to learn")
    train_turns: Literal["all", "last"] = setting("all", "turns of these roles to learn: all, or the last")
    chat_template: str | None = setting(
        None, f"chat template: a Jinja file, or {', '.join(templates.names())}; the tokenizer's unless given"
    )
    eval_by: Literal["rows", "windows"] = setting(
        "rows",
        "evaluate rows and stretches of plain text, the same at any length, or windows, as older runs did",
    )
    allow: tuple[str, ...] = setting((), "checks to turn off")

    @property
    def window(self) -> int:
        """Returns the length in tokens. Raises ConfigError while it is still "auto"."""
        if self.length == AUTO:
            raise ConfigError("length is 'auto' and not decided yet; give a number of tokens")
        return int(self.length)

    @property
    def shape(self) -> Shape:
        """Returns the shape of tables' columns."""
        template = self.prompt_template
        return Shape(self.columns, "" if template is None else template_of(template))

    def problems(self) -> Iterator[str]:
        """Yields a sentence for every value out of range or contradiction."""
        if self.length != AUTO:
            yield from Range("1 or more", ("length",), 1).problems(self)
        yield from shape.problems(self.columns, self.shape.template)
        if self.train_on == "all" and self.train_roles != Reading.train_roles:
            roles, on = option("train_roles"), option("train_on", "all")
            yield f"{roles} chooses turns, but {on} learns all of them; leave one of them out"
        if self.train_on == "all" and self.train_turns != Reading.train_turns:
            turns, on = option("train_turns"), option("train_on", "all")
            yield f"{turns} chooses turns, but {on} learns all of them; leave one of them out"
        if not self.train_roles:
            yield f"{option('train_roles')} must name a role, got none; the usual one is assistant"
