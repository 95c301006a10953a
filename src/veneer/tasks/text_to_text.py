"""Texts from texts by an encoder and a decoder: translations, summaries, sentences from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapt.modes import evaluating
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.tasks.base.abilities import Examined, Outlined
from veneer.tasks.base.encoded import Encoded
from veneer.tasks.base.figure import Figure, Metric
from veneer.tasks.base.shape import Counted, Shape
from veneer.tasks.base.task import Batch, Between, batches, nothing
from veneer.tasks.measures import overlaps
from veneer.tasks.measures.scores import check_packages
from veneer.tasks.text.padded import IGNORED, Padded, check_ids, text_of

NAME = "text-to-text"
FURTHER, STEP, WORST = 16, 16, 12  # tokens beyond the true text; of a batch's widths; examples in the report


class TextToText(Padded, Outlined, Examined):
    """Pairs of texts, measured by BLEU of greedy texts, beside ROUGE-L and the nats of a token.

    prefix: words before every source text, such as "translate English to German: "
    """

    AUTO = "transformers.AutoModelForSeq2SeqLM"
    PIPELINE = "text2text-generation"
    METRIC = Metric("bleu", "BLEU", lower_is_better=False)
    FORMS = {
        "from-to": ("source", "target"),
        "asked": ("prompt", "completion"),
        "summarised": ("document", "summary"),
        "article": ("article", "highlights"),
        "e2e": ("mr", "ref"),
        "e2e-long": ("meaning_representation", "human_reference"),
    }
    SETTINGS = ("length", "label_smoothing")
    EVALUATED = 64

    def __init__(self, processor: Any, reading: Reading, *, prefix: str = "") -> None:
        check_packages(NAME, {"sacrebleu": "sacrebleu", "rouge_score": "rouge_score"})
        super().__init__(processor, reading)
        self.prefix = prefix

    def encode(self, row: Row) -> Encoded:
        source, target = (text_of(row, column) for column in self.FORMS[row.kind])
        ids = self.tokenised([self.prefix + source])["input_ids"]
        labels = self.processor(text_target=target, verbose=False)["input_ids"]
        end = self.processor.eos_token_id
        labels = [*labels, *([end] if end is not None and labels[-1:] != [end] else [])]
        content = {"input_ids": ids, "labels": torch.tensor(labels)}
        return Encoded(row, content, max(len(ids), len(labels)))

    def pieces(self, one: Encoded, window: int) -> list[Any]:
        return [{name: t[:window] for name, t in one.content.items()}]

    def labels(self, example: Mapping[str, Tensor]) -> int:
        return len(example["labels"])

    def collate(self, examples: Sequence[Any], widths: Sequence[int] = ()) -> dict[str, Tensor]:
        sources = super().collate([{"input_ids": e["input_ids"]} for e in examples], widths)
        t = STEP * -(-max(len(e["labels"]) for e in examples) // STEP)
        return {**sources, "labels": self._stacked("labels", [e["labels"] for e in examples], t)}

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {**batch, "use_cache": False}

    def check(self, model: nn.Module, examples: Sequence[Any]) -> None:
        config: Any = model.config
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"task {NAME!r} needs a model with encoder and decoder, got a {type(model).__name__}"
            )
        check_ids(model, (e[name] for e in examples for name in ("input_ids", "labels")))
        if config.decoder_start_token_id is None:
            raise DataError("model: its config must name decoder_start_token_id, got none")

    def loss(self, model: nn.Module, batch: Batch, *, smoothing: float = 0.0) -> tuple[Tensor, int]:
        logits, labels = self._logits(model, batch)
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), len(labels)

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        learned = batch["labels"] != IGNORED
        return model(**self.inputs(batch)).logits[learned].float(), batch["labels"][learned]

    def outline(self, model: nn.Module, shape: Shape, device: torch.device, counted: Counted) -> Tensor:
        ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.int64, device=device)
        rows = max(1, shape.labels // shape.rows)
        decoded = {"decoder_input_ids": ids[:, :rows], "use_cache": False}
        total: Tensor = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoded).logits.float().sum()
        )
        return total

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
        parts, written = [], []
        with evaluating(model):
            for some, inputs in batches(self, model, examples, batch, between):
                logits, labels = self._logits(model, inputs)
                owner = (inputs["labels"] != IGNORED).nonzero()[:, 0]
                nats = F.cross_entropy(logits, labels, reduction="none")
                own = torch.zeros(len(some), device=nats.device).index_add_(0, owner, nats)
                parts.append(own.double().cpu())
                written += self._written(model, some, inputs)
        truths = [self._text(e["labels"]) for e in examples]
        sizes = torch.tensor([self.labels(e) for e in examples]).double()
        nats_each = Figure.of(Metric("nats", "nats per token"), torch.cat(parts), sizes)
        return [*overlaps.figures(written, truths), nats_each]

    def _written(self, model: Any, some: Sequence[Any], inputs: Batch) -> list[str]:
        from transformers import GenerationConfig

        config, longest = model.config, max(map(self.labels, some))
        own = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest + FURTHER,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=self.processor.eos_token_id,
            pad_token_id=self.pad,
        )
        given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        return [self._text(row) for row in model.generate(**given, generation_config=own).cpu()]

    def _text(self, ids: Tensor) -> str:
        return str(self.processor.decode(ids.tolist(), skip_special_tokens=True)).strip()

    def examined(self, model: nn.Module, examples: Sequence[Any], *, batch: int) -> dict[str, Any]:
        some, written = examples[: 4 * WORST], []
        with torch.no_grad(), evaluating(model):
            for part, inputs in batches(self, model, some, batch, nothing):
                written += self._written(model, part, inputs)
        rows = [
            {"input": self._text(e["input_ids"]), "truth": self._text(e["labels"]), "answer": text}
            for e, text in zip(some, written, strict=True)
        ]
        apart = [1 - overlaps.rouge(r["answer"], r["truth"]) for r in rows]
        order = sorted(range(len(rows)), key=lambda i: -apart[i])[:WORST]
        return {"worst": [{**rows[i], "loss": apart[i]} for i in order]}
