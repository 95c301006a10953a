"""Speech recognition: the words of a clip, learned by a Whisper model and measured in word errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.forms.media import CLIPS, Media
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.data.tokenizer import Tokenizer
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Examined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.task import Batch, Between, Task, batches, nothing
from veneer.tasks.senses import audio, whisper
from veneer.tasks.senses.words import WER, word_errors

SECONDS, MASKED, WORST, SHOWN = 30.0, -100, 8, 60


class SpeechRecognition(Task, Examined):
    """Transcripts by Whisper. Examples are clips with the tokens of their words."""

    AUTO = "transformers.AutoModelForSpeechSeq2Seq"
    PROCESSOR = "transformers.AutoProcessor"
    PIPELINE = "automatic-speech-recognition"
    METRIC: ClassVar[Metric] = WER
    FORMS = {"audio": ("audio", "text")}
    MEDIA = Media("audio", "text", CLIPS, beside=".txt")
    SETTINGS = ("label_smoothing",)
    EXAMPLE = "clip"

    def __init__(
        self, processor: Any, reading: Reading, *, language: str | None = None, seconds: float = SECONDS
    ) -> None:
        """
        language: of the clips in the tokenizer's spelling, such as "de"; None for a model of one language
        seconds: window that clips are padded to; less than 30 is faster and changes the base's answers
        """
        super().__init__(processor, reading)
        if not 0.1 <= seconds <= SECONDS:
            raise ConfigError(f"seconds must be 0.1 to {SECONDS:g}, got {seconds:g}")
        self.seconds = seconds
        tokenizer: Tokenizer | None = getattr(processor, "tokenizer", None)
        if tokenizer is None or not hasattr(processor, "feature_extractor"):
            raise ConfigError(
                "task 'speech-recognition' needs a processor with a tokenizer and a feature extractor"
                f", got a {type(processor).__name__}"
            )
        self.tokenizer = tokenizer
        self.asked = whisper.prompt(self.tokenizer, language)
        self.start, self.end = (self.tokenizer.convert_tokens_to_ids(t) for t in (whisper.START, whisper.END))

    @property
    def rate(self) -> int:
        """Returns the samples a second that the model takes."""
        return int(self.processor.feature_extractor.sampling_rate)

    def encode(self, row: Row) -> Encoded:
        text = row.columns["text"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.where}: 'text' must be the words of the clip, got {text!r}")
        ids = self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        labels = torch.tensor([*self.asked, *ids, self.end])
        return Encoded(row, {"audio": audio.read(row, "audio", self.rate, self.seconds), "labels": labels})

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [one.content]

    def size(self, example: dict[str, Tensor]) -> int:
        return len(example["labels"])

    def labels(self, example: dict[str, Tensor]) -> int:
        return len(example["labels"]) - len(self.asked)

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        clips = [e["audio"].numpy() for e in examples]
        found = self.processor.feature_extractor(clips, sampling_rate=self.rate, return_tensors="pt")
        t, n = self.width(examples, widths), len(self.asked)
        rows = [nn.functional.pad(e["labels"], (0, t - len(e["labels"])), value=self.end) for e in examples]
        ids = torch.stack(rows)
        lengths = torch.tensor([len(e["labels"]) for e in examples])
        at = torch.arange(t)
        # The words that ask for a transcript are given, not learned.
        labels = ids.masked_fill((at < n) | (at >= lengths[:, None]), MASKED)
        start = torch.full((len(ids), 1), self.start)
        return {
            "input_features": found["input_features"],
            "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1),
            "labels": labels,
        }

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        whisper.check(model)
        longest = max(examples, key=self.size, default=None)
        config: Any = model.config
        room = int(config.max_target_positions)
        if longest is not None and self.size(longest) > room:
            raise DataError(
                f"a transcript of {self.size(longest)} tokens is longer than the model's {room}; split the"
                f" clip: {self.truth(longest)[:SHOWN]!r}.."
            )

    def hidden(self, model: Any, batch: Batch) -> Tensor:
        """Returns the encoder's hidden states of a batch, cut to the window of this task."""
        like = model.get_encoder().conv1.weight.dtype
        frames = round(self.seconds * whisper.FRAMES) // whisper.STRIDE * whisper.STRIDE
        h: Tensor = whisper.encoded(model, batch["input_features"][..., :frames].to(like))
        return h

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        out = model(
            encoder_outputs=(self.hidden(model, batch),), decoder_input_ids=batch["decoder_input_ids"]
        )
        labels = batch["labels"].flatten()
        options: dict[str, Any] = {"ignore_index": MASKED, "label_smoothing": smoothing, "reduction": "sum"}
        loss = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), labels, **options)
        return loss, int((labels != MASKED).sum())

    def write(self, model: nn.Module, batch: Batch) -> list[str]:
        """Returns the transcripts of a batch, by the likeliest token at every step."""
        config: Any = model.config
        most = int(config.max_target_positions) - len(self.asked) - 1
        most = min(most, 2 * batch["labels"].shape[1] + 16)  # a loop without end is as wrong after as many
        start = batch["decoder_input_ids"][:, : len(self.asked) + 1]
        found = whisper.greedy(model, self.hidden(model, batch), start, self.end, most)
        return list(self.tokenizer.batch_decode(found, skip_special_tokens=True))

    def truth(self, example: dict[str, Tensor]) -> str:
        """Returns the words of an example."""
        return str(self.tokenizer.decode(example["labels"][len(self.asked) : -1]))

    @torch.no_grad()
    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        batch: int,
        each: bool = False,
        between: Between = nothing,
    ) -> list[Figure]:
        if not examples:
            raise DataError("the text to measure must have a clip, got none")
        counts: list[tuple[int, int]] = []
        with evaluating(model):
            for some, b in batches(self, model, examples, batch, between):
                counts += [
                    word_errors(self.truth(e), w) for e, w in zip(some, self.write(model, b), strict=True)
                ]
        parts, weights = torch.tensor(counts, dtype=torch.float64).T
        return [Figure.of(self.METRIC, parts, weights)]

    @torch.no_grad()
    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        rows = []
        with evaluating(model):
            for some, b in batches(self, model, examples, batch, nothing):
                for e, text in zip(some, self.write(model, b), strict=True):
                    truth = self.truth(e)
                    wrong, words = word_errors(truth, text)
                    rows.append((wrong / max(1, words), truth, text.strip(), e["audio"]))
        rows.sort(key=lambda row: -row[0])
        return {
            "worst": [
                {"input": {"audio": audio.as_uri(x, self.rate)}, "truth": truth, "answer": text, "loss": rate}
                for rate, truth, text, x in rows[:WORST]
            ]
        }
