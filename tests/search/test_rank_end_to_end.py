"""A task whose true change has rank k makes `rank` answer k, through the training loop of `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import models

from veneer.search.rank.rank import rank
from veneer.search.rank.settings import RankSearch
from veneer.train.run import Run

WORDS, HIDDEN, SIZE = 48, 16, 6.0  # SIZE: singular values of the planted change, all alike
TOKENS = {"train": 60_000, "valid": 4096, "test": 4096}


def tokenizer() -> Any:
    """A token for each of the words w0, w1, ..; w0 ends a text too, so that no token is new to the base."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0", pad_token="w0")


@torch.no_grad()
def planted(folder: Path, k: int) -> dict[str, Any]:
    """Writes a base, and texts of the same model with a change of rank k in its head.

    The block's attention adds nothing, so a token depends on the one before it alone.
    """
    torch.manual_seed(k)
    own = {"vocab_size": WORDS, "num_hidden_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2}
    model = models.llama(**own, num_key_value_heads=2, tie_word_embeddings=False)
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    W = model.lm_head.weight
    U, V = (torch.linalg.qr(torch.randn(n, k)).Q for n in W.shape)
    W.add_(SIZE * U @ V.mT)
    table = model(input_ids=torch.arange(WORDS)[:, None]).logits[:, 0].softmax(-1)
    for part, n in TOKENS.items():
        (folder / f"{part}.txt").write_text(chain(table, n), encoding="utf-8")
    return {"model": str(folder / "base"), **{p: str(folder / f"{p}.txt") for p in ("valid", "test")}}


def chain(table: torch.Tensor, n: int) -> str:
    """Returns n words, each drawn from the row of `table` of the word before."""
    drawn, at, words = torch.multinomial(table, n, replacement=True).tolist(), 0, []
    for i in range(n):
        at = drawn[at][i]
        words.append(f"w{at}")
    return " ".join(words)


@pytest.mark.parametrize("k", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_planted_rank_is_found_through_the_training_loop(k, tmp_path):
    own = {**planted(tmp_path, k), "data": str(tmp_path / "train.txt"), "known": "none", "to": "lm_head"}
    own |= {"lr": 0.05, "steps": 250, "batch": 32, "length": 64, "eval_every": 250, "eval_windows": 0}
    run = Run.from_dict({**own, "precision": "fp32", "compile": "off", "device": "cpu"})
    found = rank(run, RankSearch(most=8, out=str(tmp_path / "rank")), progress=False)
    assert found["rank"] == k and found["reason"].startswith(f"cut to rank {k}, the pilot of rank 8 loses")
    shortfalls = [entry["low"] for r, entry in found["curve"].items() if int(r) < k]
    allowed = 0.005 * found["curve"]["8"]["cost"]
    assert all(low > 10 * allowed for low in shortfalls), "every smaller rank loses far more than tolerance"
    assert found["test"]["before"] - found["test"]["uniform"] > 0.95 * (
        found["test"]["before"] - found["test"]["pilot"]
    )
