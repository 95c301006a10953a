"""`fit` as a whole: settings, what is checked at the door, learning by every method, and what lies in the
folder afterwards."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import models, tiny
from support.objectives import causal_lm
from torch import nn

import veneer
from veneer import errors, optim, settings
from veneer.adapt import attached
from veneer.data import pack
from veneer.data.row_files import Row
from veneer.data.spread import spread
from veneer.data.tokens import Tokens
from veneer.errors import ConfigError, DataError, ShapeError, SiteError
from veneer.models import pretrained
from veneer.optim.base import groups
from veneer.runs import prepare
from veneer.runs.fit import begin, fit, look, loop_of
from veneer.runs.texts import texts
from veneer.tasks.text import next_token
from veneer.tasks.text.bits import bits_per_byte
from veneer.train import checks, full
from veneer.train.folder.result import Result
from veneer.train.loop.progress import Notes, Voice
from veneer.train.loop.schedule import Pace
from veneer.train.loop.step import Learner
from veneer.train.run import Run

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fit")


@pytest.fixture
def given(place, tmp_path) -> dict[str, Any]:
    """A short training in a folder of its own."""
    return tiny.settings(place, out=str(tmp_path / "run"), steps=6, eval_every=3)


def loaded(name: str) -> nn.Module:
    return pretrained.causal_lm(name, torch.float32, torch.device("cpu"))


# -- settings ------------------------------------------------------------------------------------------------


def refused(**changed: Any) -> list[str]:
    with pytest.raises(ConfigError) as e:
        Run.from_dict({"data": "a.txt", **changed})
    assert e.value.exit_code == 2
    return str(e.value).splitlines()


def test_all_unknown_and_unsuitable_settings_are_named_at_once():
    assert refused(rnak=3, rank=4, batchs=2, lr="fast", steps=1.5, packing="yes", betas=[0.9], keep=True) == [
        "unknown setting 'rnak'; did you mean 'rank'?",
        "unknown setting 'rank'; put it inside options, as  options: {rank: ..}",
        "unknown setting 'batchs'; did you mean 'batch'?",
        "lr must be a number, got 'fast'",
        "steps must be a whole number, got 1.5",
        "packing must be true or false, got 'yes'",
        "betas must have 2 values, got 1: [0.9]",
        "keep must be a whole number, got True",
    ]
    both = refused(
        batchs=2, options={"rnak": 3, "alpha": "much"}, optimiser="loraplus", optimiser_options={"ration": 2}
    )
    assert both == [
        "unknown setting 'batchs'; did you mean 'batch'?",
        "method 'lora' has no option 'rnak'; did you mean 'rank'?",
        "method 'lora': alpha must be a number, got 'much'",
        "optimiser 'loraplus' has no option 'ration'; did you mean 'ratio'?",
    ]
    with pytest.raises(ConfigError, match="data must be given: texts to learn from"):
        Run.from_dict({})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0}, "lr must be above 0, got 0"),
        (
            {"ratio": 4, "optimiser": "loraplus"},
            "unknown setting 'ratio'; put it inside optimiser_options, as  optimiser_options: {ratio: ..}",
        ),
        ({"optimiser_options": {"ratio": 4}}, "optimiser 'adamw' has no option 'ratio'; known: none"),
        (
            {"optimiser_options": {"rate": 4}, "optimiser": "loraplus"},
            "optimiser 'loraplus' has no option 'rate'; did you mean 'ratio'?",
        ),
        (
            {"optimiser_options": {"ratio": "4"}, "optimiser": "loraplus"},
            "optimiser 'loraplus': ratio must be a number, got '4'",
        ),
        (
            {"optimiser_options": {"ratio": 0}, "optimiser": "loraplus"},
            "optimiser 'loraplus': ratio must be > 0, got 0",
        ),
        (
            {"optimiser_options": {"ratio": 0.5}, "optimiser": "loraplus"},
            "optimiser 'loraplus': ratio 0.5 < 1 slows B down, the opposite of LoRA+; use >= 1, or pass"
            " allow='ratio'",
        ),
        (
            {"optimiser": "loraplus", "method": "full"},
            "optimiser 'loraplus' needs factors B, and method 'full' lacks B; use optimiser='adamw'",
        ),
        ({"optimiser": "adamv"}, "unknown optimiser 'adamv'; did you mean 'adamw'?"),
        (
            {"untie": True, "method": "full"},
            "untie is for adapters; method 'full' trains the weight that tied layers share: leave it out",
        ),
        (
            {"rank_pattern": {"q": 2}, "method": "full"},
            "rank_pattern needs an option 'rank', which method 'full' lacks; leave it out",
        ),
        ({"options": {"rnk": 2}}, "method 'lora' has no option 'rnk'; did you mean 'rank'?"),
        ({"options": {"rank": "8"}}, "method 'lora': rank must be a whole number, got '8'"),
        ({"method": "lroa"}, "unknown method 'lroa'; did you mean 'lora'?"),
        ({"steps": 3, "epochs": 2}, "steps and epochs both set the length, got 3 and 2; give one of them"),
        (
            {"data": []},
            "data must name a text, got none; give files (.txt, .jsonl), builtin:prose or builtin:c",
        ),
        ({"known": ["none", "a.txt"]}, "known must be 'none' or texts, got both (a.txt); give one of them"),
        ({"keep": 1}, "keep must be 2 or more, got 1; one must be left if the newest is damaged"),
        ({"warmup": 1.5}, "warmup must be a share below 1 or a whole number of steps, got 1.5"),
        ({"warmup": 9, "steps": 9}, "warmup must be less than steps, got 9 and 9"),
        ({"label_smoothing": 1}, "label_smoothing must be in [0, 1), got 1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in [0, 1), got -0.1"),
        ({"betas": [0.9, 1]}, "betas must both be in [0, 1), got (0.9, 1.0)"),
        ({"allow": ["confg"]}, "allow: unknown check 'confg'; did you mean 'config'?"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, message):
    assert refused(**changed) == [message]


def test_several_of_them_are_refused_together():
    assert (
        len(refused(steps=0, batch=0, weight_decay=-1, optimiser_options={"ratio": 2.0}, options={"x": 1}))
        == 5
    )


def test_what_is_allowed_or_left_open_is_decided():
    slow = {"optimiser": "loraplus", "optimiser_options": {"ratio": 0.5}}
    assert Run(data="a.txt", **slow, allow=("ratio",)).optimiser_options == {"ratio": 0.5}
    chosen = prepare.decided(Run(data="a.txt", optimiser="loraplus"), torch.device("cpu"))
    assert chosen.optimiser_options == {"ratio": 16.0}
    assert Run(data=["a.txt", "b.txt"], lr=1, to=["q", "v"]) == Run(
        data=("a.txt", "b.txt"), lr=1.0, to=("q", "v")
    )


def test_yaml_numbers_are_numbers_and_what_is_no_setting_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: [a.txt, 1e3.txt]\nlr: 1e-5\nweight_decay: 2.5E-3\noptions:\n  rank: 16\n  alpha: 1e1\nbf: 1\n"
    )
    with pytest.raises(ConfigError, match="unknown setting 'bf'"):
        Run.from_yaml(file)
    file.write_text(file.read_text().replace("bf: 1\n", "seed: 7\n"))
    run = Run.from_yaml(file)
    assert (run.data, run.lr, run.weight_decay, run.seed) == (("a.txt", "1e3.txt"), 1e-5, 2.5e-3, 7)
    assert run.options == {"rank": 16, "alpha": 10.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 1\nlr: 2", "FILE: given twice: lr; keep one of each"),
        ("", "FILE must hold settings, got nothing; write one a line, e.g.  lr: 1e-3"),
        ("- lr", "FILE must hold settings, got ['lr']; write one a line, e.g.  lr: 1e-3"),
        ("lr: [1", "FILE is not YAML: while parsing a flow sequence"),
    ],
)
def test_yaml_that_cannot_be_read_is_refused(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as e:
        Run.from_yaml(file)
    assert str(e.value).splitlines()[0].replace(str(file), "FILE") == message
    with pytest.raises(ConfigError, match=r"gone\.yaml does not exist"):
        Run.from_yaml(tmp_path / "gone.yaml")


def test_every_setting_has_a_help_text_and_every_number_that_has_a_unit_says_it():
    table = settings.table(Run)
    assert all(row.help and settings.describe(row.hint) for row in table.values())
    assert {n for n, row in table.items() if row.unit == "steps"} == {
        "steps",
        "eval_every",
        "save_every",
        "trp_every",
    }


# -- the door ------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"{n} cats?", "completion": " yes" * (n % 3 + 1)} for n in range(11)]


def door_says(given: dict[str, Any], kind: type[errors.VeneerError], **changed: Any) -> str:
    """The message with which fit refuses, having written nothing."""
    before = sorted(Path(given["out"]).parent.rglob("*"))
    with pytest.raises(kind) as e:
        fit(Run.from_dict({**given, **changed}), progress=False)
    assert sorted(Path(given["out"]).parent.rglob("*")) == before
    return str(e.value)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        (
            {"length": 129},
            ConfigError,
            "length must be at most 128, this model's longest sequence (max_position_embeddings), got 129",
        ),
        ({"to": ["q_prj"]}, SiteError, "no layer is called 'q_prj'; did you mean 'q_proj'?"),
        (
            {"options": {"rank": 64}, "to": ["q_proj"]},
            ShapeError,
            "rank 64 > min(out, in) = 32 at 'model.layers.0.self_attn.q_proj'",
        ),
        ({"options": {"dropout": 1.5}}, ConfigError, "dropout must be in [0, 1), got 1.5"),
        (
            {"embedding_lr": 0.1},
            ConfigError,
            "embedding_lr needs a trained embedding; leave it out, or adapt embeddings with to=",
        ),
        (
            {"weight_decay": 200, "lr": 0.1},
            ConfigError,
            "weight_decay must be less than 10 at rate 0.1, got 200",
        ),
        ({"device": "gpu"}, ConfigError, "device 'gpu' cannot be used here: "),
        (
            {"data": "builtin:prosa"},
            DataError,
            "builtin:prosa: unknown built-in text 'prosa'; did you mean 'prose'?",
        ),
        (
            {"known": "builtin:known:train"},
            DataError,
            "builtin:known:train: the part of 'known' must be one of valid, test, got 'train'",
        ),
        ({"model": "/nowhere/at/all"}, ConfigError, "model: the folder /nowhere/at/all does not exist"),
        ({"model": HERE}, ConfigError, f"model: the folder {HERE} holds no model: config.json is missing"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(given, changed, kind, message):
    assert door_says(given, kind, **changed).startswith(message)


def test_texts_that_cannot_be_used_are_refused_all_at_once(given, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    said = door_says(
        given,
        DataError,
        data=str(tmp_path / "empty.txt"),
        valid=str(tmp_path / "latin.txt"),
        known=str(tmp_path / "gone"),
    )
    short = [line.split(f"{tmp_path}/")[1][:19] for line in said.splitlines()]
    assert short == ["empty.txt: the file", "latin.txt: not UTF-", "gone: the file does"]


def test_padding_is_counted(given, tmp_path):
    rows = [{"text": "one two three " * n} for n in (1, 2, 4, 8)] * 8
    data = str(tiny.jsonl(tmp_path / "rows.jsonl", *rows))
    shared = {
        **given,
        "data": data,
        "valid": data,
        "length": 64,
        "batch": 4,
        "accumulate": 1,
        "epochs": 1.0,
        "steps": None,
    }
    packed, padded = (
        fit(Run.from_dict({**shared, "packing": p, "out": str(tmp_path / str(p))}), progress=False)
        for p in (True, False)
    )
    assert 0 <= packed.metrics["padding_share"] < 0.2
    assert packed.metrics["tokens"] == padded.metrics["tokens"]
    assert padded.metrics["padding_share"] < 0.1  # of like length, four times eight of each


def test_a_batch_without_a_label_is_refused():
    model = veneer.attach(models.llama(), rank=2)
    parts = groups.of_adapter(model, "default")
    learner = Learner(model, parts, groups.adamw(parts, {}), causal_lm(), next_token.loss, 1.0, 0.0)
    masked = (pack.Segment(torch.tensor([1, 2]), torch.tensor([-100, -100]), torch.zeros(2)),)
    with pytest.raises(DataError) as e:
        learner.step([[masked]], 0.1)
    assert (
        str(e.value) == "no token of this batch is learned (every label is masked); give rows with a"
        " completion, or train_on='all'"
    )


def test_a_layer_that_is_never_called_is_refused(given, monkeypatch):
    def with_idle(*args: Any, **options: Any) -> nn.Module:
        model = real(*args, **options)
        model.idle = nn.Linear(4, 4)
        return model

    real = pretrained.model
    monkeypatch.setattr(pretrained, "model", with_idle)
    said = door_says(given, SiteError, to=["q_proj", "idle"], options={"rank": 2})
    assert said.startswith("1 adapted layers were never called in the first training step: idle.")
    said = door_says(given, SiteError, method="full", options={})
    assert said.startswith("method 'full' saves a change of each module")


def test_a_tokenizer_of_another_model_and_missing_weights_are_refused(given, tmp_path):
    small = models.llama(vocab_size=40, max_position_embeddings=128)
    small.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    said = door_says(given, DataError, model=str(tmp_path / "base"))
    assert said.endswith("got 317 from the tokenizer; use the model's own tokenizer")
    (tmp_path / "base" / "model.safetensors").unlink()
    small.save_pretrained(
        tmp_path / "base", state_dict={k: v for k, v in small.state_dict().items() if "lm_head" not in k}
    )
    said = door_says(given, ConfigError, model=str(tmp_path / "base"))
    assert (
        said == f"model {str(tmp_path / 'base')!r} lacks 1 weights of a LlamaForCausalLM, which"
        " would be random: lm_head.weight"
    )


def test_a_module_that_takes_more_than_one_input_cannot_be_kept_as_a_change():
    with pytest.raises(SiteError, match=r"in this model 1 modules are not: .*experts"):
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = dict(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        checks.check_leaves(
            MixtralForCausalLM(MixtralConfig(num_local_experts=2, **sizes)),
            {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "use_cache": False},
        )


# -- learning ------------------------------------------------------------------------------------------------

METHODS = {
    "lora": {"options": {"rank": 4}, "lr": 2e-2},
    "dora": {"method": "dora", "options": {"rank": 4}, "lr": 2e-2},
    "pissa": {"options": {"rank": 4, "init": "pissa"}, "lr": 2e-2},
    "loraplus": {"options": {"rank": 4}, "optimiser": "loraplus", "lr": 3e-3, "weight_decay": 0.1},
    "lorapro": {
        "options": {"rank": 4},
        "optimiser": "lorapro",
        "optimiser_options": {"form": "full"},
        "lr": 1e-2,
    },
    "full": {"method": "full", "options": {}, "lr": 5e-3},
    "bf16": {"options": {"rank": 4}, "lr": 2e-2, "precision": "bf16"},
    "full bf16": {"method": "full", "options": {}, "lr": 5e-3, "precision": "bf16"},
}


def measured(
    result: Result,
    given: dict[str, Any],
    part: str,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Bits per byte of a text with the adapter loaded from its folder onto a fresh base."""
    model = veneer.load(pretrained.causal_lm(given["model"], dtype, torch.device("cpu")), result.adapter)
    run = Run.from_dict(given)
    rows = texts.gather(texts.named(run), Notes())[part]
    task = causal_lm(pretrained.tokenizer(run.model), **tiny.reading(run))
    windows = texts.evaluated({part: texts.prepare(rows, task, Notes())}, run, task)[part]
    with veneer.using(model, {"default": strength}):
        return bits_per_byte(model, windows, next_token.loss, batch=run.batch)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_its_adapter_is_what_was_measured(given, name):
    given = {**given, **METHODS[name]}
    result = fit(Run.from_dict(given), progress=False)
    assert result.learned.after < 0.93 * result.learned.before
    assert result.metrics["learned"]["text"] == "valid" and result.forgotten is not None
    dtype, tolerance = (
        (torch.bfloat16, 2e-2) if name == "bf16" else (torch.float32, 2e-2 if "bf16" in name else 1e-5)
    )
    for part in ("valid", "known"):
        assert measured(result, given, part, 1.0, dtype) == pytest.approx(
            result.metrics["after"][part], rel=tolerance
        )
        assert measured(result, given, part, 0.0, dtype) == pytest.approx(
            result.metrics["before"][part], rel=tolerance
        )
    own = [p for p in Path(result.adapter).iterdir() if p.suffix == ".safetensors"]
    assert result.metrics["adapter_bytes"] == sum(p.stat().st_size for p in own) > 0


def test_what_large_moments_take_is_said_before_the_training(given):
    result = fit(Run.from_dict({**given, **METHODS["lorapro"], "steps": 1, "to": ["q_proj"]}), progress=False)
    notes = "\n".join(json.loads((result.folder / "config.json").read_text())["notes"])
    said = (
        r"LoRA-Pro's full form keeps two matrices of every layer's size: [\d.]+ kB; form"
        r" factored keeps [\d.]+ kB"
    )
    assert re.search(said, notes)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa"])
def test_the_adapter_opens_in_peft(given, name):
    from peft import PeftModel

    result = fit(Run.from_dict({**given, **METHODS[name]}), progress=False)
    ours = veneer.load(loaded(given["model"]), result.adapter)
    theirs = PeftModel.from_pretrained(loaded(given["model"]), str(result.adapter)).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
        assert (ours(ids).logits - loaded(given["model"])(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_is_kept_as_a_change_that_can_be_dialled(given, tmp_path, tied):
    given = {
        **given,
        **METHODS["full"],
        "model": str(tiny.base(tmp_path / "base", tie_word_embeddings=tied)),
        "known": "none",
    }
    result = fit(Run.from_dict(given), progress=False)
    state = load_file(
        result.folder / "checkpoints" / f"step-{result.metrics['best_step']:06d}" / "state.safetensors"
    )
    base, model = loaded(given["model"]), veneer.load(loaded(given["model"]), result.adapter)
    half, whole = loaded(given["model"]), loaded(given["model"])
    with torch.no_grad():
        for n, p in whole.named_parameters():
            p.copy_(state[f"p.{n}"])
        for n, p in half.named_parameters():
            p.add_(state[f"p.{n}"] - p, alpha=0.5)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        with veneer.using(model):
            assert torch.equal(model(ids).logits, base(ids).logits)
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)
        with veneer.using(model, {"default": 0.5}):
            torch.testing.assert_close(model(ids).logits, half(ids).logits, rtol=1e-4, atol=1e-4)
        assert (whole(ids).logits - base(ids).logits).abs().max() > 0.1


def test_layers_that_share_a_weight_share_its_change():
    model = models.llama(tie_word_embeddings=True)
    original = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    full.as_change(model, original, "full")
    changes = {site.name: delta for site, delta in attached.changes(model, "full")}
    assert changes["model.embed_tokens"].D is changes["lm_head"].D
    assert all(torch.equal(p, original[n]) for n, p in attached.base_parameters(model).items())
    D = changes["model.embed_tokens"].D.view_as(trained["lm_head.weight"])
    torch.testing.assert_close(original["lm_head.weight"] + D, trained["lm_head.weight"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changed", "n_groups"),
    [
        ({}, 1),  # A and B of all layers
        ({"method": "dora"}, 2),  # and magnitudes, which do not decay
        ({"optimiser": "loraplus"}, 2),  # A, and B with its own rate
        ({"method": "full", "options": {}}, 2),  # matrices, and norms
    ],
)
def test_on_a_cpu_adamw_is_fused_and_has_few_groups(given, changed, n_groups):
    run = Run.from_dict({**given, **changed})
    with ExitStack() as stack:
        begun = begin(look(run, Voice(False), stack), Voice(False), stack)
        optimiser = loop_of(begun).learner.optimiser
        trained = {p for p in begun.ready.model.parameters() if p.requires_grad}
    assert isinstance(optimiser, torch.optim.AdamW) and all(p.device.type == "cpu" for p in trained)
    assert len(optimiser.param_groups) == n_groups and all(g["fused"] is True for g in optimiser.param_groups)
    assert {p for g in optimiser.param_groups for p in g["params"]} == trained


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2), (3, 2)])
def test_accumulated_micro_batches_are_one_batch(batch, accumulate):
    draw = torch.Generator().manual_seed(0)
    sizes = [
        (9, 2),
        (4, 3),
        (12, 11),
        (7, 0),
    ]  # (tokens, the first that is learned): a mean of means would differ
    rows = [
        Tokens(
            torch.randint(models.VOCABULARY, (n,), generator=draw), torch.arange(n) >= first, torch.ones(n)
        )
        for n, first in sizes
    ]
    windows = [tuple(pack.segments(r, 16)) for r in rows]

    def after_a_step(micro: list[list[pack.Window]]) -> tuple[float, float, list[torch.Tensor]]:
        model = veneer.attach(models.llama().double(), rank=2)
        parts = groups.of_adapter(model, "default")
        learner = Learner(
            model,
            parts,
            optim.make("loraplus", ratio=4.0).build(optim.Trained(parts)),
            causal_lm(),
            next_token.loss,
            0.01,
            0.1,
        )
        outcome = learner.step(micro, 0.1)
        return outcome.loss, outcome.norm, [p.parameter.detach() for p in parts]

    split = [windows[i : i + batch] for i in range(0, 4, batch)]
    assert len(split) <= accumulate
    (loss, norm, one), (loss2, norm2, many) = after_a_step([windows]), after_a_step(split)
    assert (loss2, norm2) == (pytest.approx(loss, rel=1e-12), pytest.approx(norm, rel=1e-10))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_bits_per_byte_by_hand():
    model = models.llama(vocab_size=len(tiny.tokenizer())).double()
    row = Row("text", {"text": "the cat sat on the möön"}, "")
    windows = texts.prepare([row], causal_lm(tiny.tokenizer(), length=16), Notes()).examples
    ids = torch.tensor(
        [
            tiny.tokenizer().bos_token_id,
            *tiny.tokenizer()(row.columns["text"])["input_ids"],
            tiny.tokenizer().eos_token_id,
        ]
    )
    nats = 0.0
    for start in range(
        0, len(ids) - 1, 16
    ):  # the text in windows of 16 predictions that see nothing before them
        some = ids[start : start + 17]
        p = model(some[None, :-1]).logits[0].log_softmax(-1).detach()
        nats -= float(p[torch.arange(len(some) - 1), some[1:]].sum())
    expected = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)) / len(row.columns["text"].encode())
    model.train()
    assert bits_per_byte(model, windows, next_token.loss, batch=2) == pytest.approx(float(expected), rel=1e-9)
    assert (
        model.training
        and spread([1, 2, 3, 4, 5, 6], 3) == [1, 3, 5]
        and spread([1, 2], 0) == spread([1, 2], 5) == [1, 2]
    )


# -- the run's folder ----------------------------------------------------------------------------------------


def test_the_best_step_is_what_is_kept(given, monkeypatch):
    # Descends for five steps, then climbs: the best step lies before the last one on every processor.
    monkeypatch.setattr(Pace, "rate", lambda pace, step: 0.01 if step < 5 else -0.01)
    wild = {**given, "steps": 12, "eval_every": 1, "keep": 2, "save_every": 5}
    result = fit(Run.from_dict(wild), progress=False)
    lines = tiny.metrics(result.folder)
    curve = {m["step"]: m["valid_bpb"] for m in lines if "valid_bpb" in m and m["step"]}
    best = min(curve, key=lambda step: curve[step])
    assert (
        best < 12 and result.metrics["best_step"] == best and result.metrics["after"]["valid"] == curve[best]
    )
    assert measured(result, wild, "valid") == pytest.approx(curve[best], rel=1e-5)
    kept = {p.name for p in (result.folder / "checkpoints").iterdir()}
    assert f"step-{best:06d}" in kept and "step-000012" in kept


def test_the_folder_says_how_and_from_what_it_was_made(given):
    result = fit(Run.from_dict({**given, "epochs": 0.5, "steps": None}), progress=False)
    assert {p.name for p in result.folder.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "results.json",
    }
    suffixes = {p.suffix for p in result.folder.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md", ""}
    config = json.loads((result.folder / "config.json").read_text())
    assert config["run"]["epochs"] == 0.5 and result.metrics["steps"] == 6  # half of 48 windows, four a step
    assert config["run"]["precision"] == "fp32" and config["run"]["known"] == given["known"].split(",")
    assert config["data"]["train"]["learned_bytes"] == len(Path(given["data"]).read_bytes())
    assert set(config["data"]) == {"train", "valid", "known"} and len(config["base"]["sha256"]) == 64
    assert "scale 2" in " ".join(config["notes"])
    assert (
        result.metrics["trainable_parameters"] == 3712
        and result.metrics["versions"]["torch"] == torch.__version__
    )


def test_conversations_without_valid_text_are_learned_and_a_part_is_set_aside(given, tmp_path):
    answer = {"role": "assistant", "content": "the moon"}
    talks = [
        {"messages": [{"role": "user", "content": f"{n} cats?"}, answer], "source": "me"} for n in range(30)
    ]
    data = tiny.jsonl(tmp_path / "talks.jsonl", *talks)
    result = fit(Run.from_dict({**given, "data": str(data), "valid": [], "known": "none"}), progress=False)
    notes = result.metrics["notes"]
    assert "unused columns: source" in notes
    assert "no valid text is given: 3 of 30 rows are set aside to choose the best step by" in notes
    assert result.forgotten is None and result.learned.after < result.learned.before
    config = json.loads((result.folder / "config.json").read_text())
    assert (
        config["data"]["train"]["learned_bytes"] == 27 * len("the moon")
        and config["data"]["train"]["conversations"] == 27
    )
    assert (result.adapter / "tokenizer.json").is_file()  # for whoever opens the adapter alone


def test_unpacked_windows_hold_one_row_each(given, tmp_path):
    data = tiny.jsonl(tmp_path / "pairs.jsonl", *PAIRS)
    facts = []
    for packing in (True, False):
        result = fit(
            Run.from_dict(
                {**given, "data": str(data), "packing": packing, "out": str(tmp_path / str(packing))}
            ),
            progress=False,
        )
        facts.append(json.loads((result.folder / "config.json").read_text())["data"]["train"])
    assert (
        facts[1]["windows"] == 11 > facts[0]["windows"]
        and facts[0]["learned_tokens"] == facts[1]["learned_tokens"]
    )


def test_the_users_random_numbers_and_default_signals_are_left_alone(given):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(Run.from_dict({**given, "steps": 1}), progress=False)
    assert torch.equal(torch.rand(3), expected)


# -- what is said --------------------------------------------------------------------------------------------


def test_without_a_terminal_there_are_sentences_and_no_bar(given, capsys):
    fit(Run.from_dict({**given, "steps": 1}), progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert [line.split()[0] for line in err.splitlines()] == ["lora", "train:"]
    fit(Run.from_dict({**given, "steps": 1, "out": given["out"] + "2"}), progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("plain", [True, False])
def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_time_left(monkeypatch, plain):
    terminal, file = pty.openpty()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if plain:
        monkeypatch.setenv("NO_COLOR", "1")
    with io.TextIOWrapper(os.fdopen(file, "wb")) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        voice = Voice(True)
        with voice.bar(40, 10):
            voice.show(20, "loss 1.234  5,678 tokens/s")
            voice.say("by the way [this]")
        stderr.flush()
        written = b""
        while select.select([terminal], [], [], 0.5)[0]:  # one read returns a part of a long output
            written += os.read(terminal, 1 << 16)
        shown = written.decode()
    os.close(terminal)
    assert all(word in shown for word in ("20/40", "loss 1.234  5,678 tokens/s", "left", "by the way [this]"))
    assert ("\x1b[3" in shown) is not plain  # colours
    assert voice.said == ["by the way [this]"]


def test_the_built_in_model_learns_the_interpreters_own_prose(tmp_path):
    settings = {
        "data": "builtin:prose",
        "steps": 1,
        "batch": 1,
        "length": 64,
        "eval_windows": 2,
        "report": False,
        "out": str(tmp_path / "run"),
    }
    result = fit(Run.from_dict(settings), progress=False)
    assert (
        set(result.metrics["after"]) == {"valid", "test", "known"}
        and result.metrics["learned"]["text"] == "test"
    )
    assert result.metrics["lr"] == 5e-3
