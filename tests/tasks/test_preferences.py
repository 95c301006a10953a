"""Tasks on preferences: losses, gradients, the reference, columns, bad rows."""

from __future__ import annotations

import copy
import functools
import json
import math

import pytest
import torch
from oracles import preference as oracle
from support import models, tiny
from torch import Tensor

import veneer
from veneer.adapt.attached import active, changes
from veneer.data.reading import Reading
from veneer.data.row_files import Row
from veneer.errors import ConfigError, DataError
from veneer.runs.fit import fit
from veneer.tasks import build, get
from veneer.tasks.orpo import log_odds
from veneer.tasks.preference.scores import Scores
from veneer.train.run import Run

READING = Reading(length=64)
ROWS = [
    {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"},
    {"prompt": "seven dogs ran", "chosen": " round", "rejected": " in the old house and looked"},
    {"prompt": "the moon", "chosen": " and the rain", "rejected": " while"},
]
PAIRED = ("dpo", "ipo", "orpo", "simpo")
NAMES = (*PAIRED, "kto")
CASES = [
    ("dpo", {}, oracle.dpo, {}),
    ("dpo", {"beta": 0.5}, functools.partial(oracle.dpo, beta=0.5, smoothing=0.2), {"smoothing": 0.2}),
    ("dpo", {"kind": "robust"}, functools.partial(oracle.robust, smoothing=0.3), {"smoothing": 0.3}),
    ("dpo", {"kind": "hinge"}, oracle.hinge, {}),
    ("dpo", {"nll": 0.7}, functools.partial(oracle.with_nats, nll=0.7), {}),
    ("ipo", {"beta": 0.2}, functools.partial(oracle.ipo, beta=0.2), {}),
    ("orpo", {"beta": 0.3}, functools.partial(oracle.orpo, beta=0.3), {}),
    ("simpo", {}, oracle.simpo, {}),
    ("simpo", {"beta": 2.5, "gamma": 0.5}, functools.partial(oracle.simpo, beta=2.5, gamma=0.5), {}),
]


def task(name, **options):
    return build(name, tiny.tokenizer(), READING, options)


def row(columns, kind="prompt-pairs"):
    return Row(kind, columns, "here")


def examples(own, rows=ROWS):
    return [piece for r in rows for piece in own.pieces(own.encode(row(r)), 64)]


def model(seed=1):
    """A tiny model in float64 whose adapter is away from its start."""
    found = veneer.attach(models.llama(vocab_size=len(tiny.tokenizer())).double(), "lora", rank=2)
    models.randomise(found, seed=seed, size=0.3)
    return found


# -- losses ----------------------------------------------------------------------------------------


def probabilities(found, batch):
    """The log-probability and the number of every row's labels, position by position."""
    logits = found(batch["input_ids"]).logits
    every = []
    for own, labels in zip(logits, batch["labels"], strict=True):
        terms = [torch.log(torch.softmax(own[i], -1)[y]) for i, y in enumerate(labels.tolist()) if y != -100]
        every.append((sum(terms), len(terms)))
    return every


def gradients(found, total):
    trained = [p for _, d in changes(found, "default") for p in d.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, trained)])


@pytest.mark.parametrize(("name", "options", "formula", "given"), CASES)
def test_loss_and_gradients_equal_the_oracle(name, options, formula, given):
    own, found = task(name, **options), model()
    base = copy.deepcopy(found)
    veneer.detach(base, "default")
    batch = own.collate(examples(own))
    loss, n = own.loss(found, batch, **given)
    seen, reference = probabilities(found, batch), probabilities(base, batch)
    total, surrogate = 0.0, 0.0
    for i in range(3):
        (w, k), (v, m), (rw, _), (rv, _) = seen[i], seen[i + 3], reference[i], reference[i + 3]
        value, by_w, by_v = formula(*map(Tensor.item, (w, v, rw, rv)), k, m)
        total, surrogate = total + value, surrogate + by_w * w + by_v * v
    assert n == 3 and loss.item() == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(gradients(found, loss), gradients(found, surrogate), rtol=1e-8, atol=1e-12)
    assert active(found) == {"default": 1.0}


@pytest.mark.parametrize(("seed", "above"), [(1, False), (6, True)])
def test_ktos_loss_and_gradients_equal_the_oracle(seed, above):
    own, found = task("kto", beta=0.4, desirable=1.5, undesirable=0.5), model(seed)
    base = copy.deepcopy(found)
    veneer.detach(base, "default")
    some = examples(own)
    batch = own.collate(some)
    # The next pair's first answer behind each prompt, built by hand.
    gains = []
    for i, one in enumerate(some):
        answer = some[(i // 2 * 2 + 2) % len(some)]["answer"]
        ids = torch.cat([one["prompt"], answer])[None]
        labels = torch.full_like(ids, -100)
        labels[0, len(one["prompt"]) :] = answer
        mixed = {"input_ids": ids[:, :-1], "labels": labels[:, 1:]}
        gains.append((probabilities(found, mixed)[0][0] - probabilities(base, mixed)[0][0]).item())
    z = max(0.0, sum(gains) / len(gains))
    loss, n = own.loss(found, batch)
    seen, reference = probabilities(found, batch), probabilities(base, batch)
    total, surrogate = 0.0, 0.0
    for (p, _), (r, _), one in zip(seen, reference, some, strict=True):
        value, slope = oracle.kto(p.item() - r.item(), bool(one["good"]), z, 0.4, 1.5, 0.5)
        total, surrogate = total + value, surrogate + slope * p
    assert n == 6 and (z > 0) is above and loss.item() == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(gradients(found, loss), gradients(found, surrogate), rtol=1e-8, atol=1e-12)


PARTNERS = [
    ("aabbc", "bbcca"),  # the next answer to another prompt, past equal prompts, around the end
    ("abab", "baba"),
    ("aaaa", "aaaa"),  # one prompt alone: the next answer, which is never the row's own
    ("ab", "ba"),
]


@pytest.mark.parametrize(("prompts", "partners"), PARTNERS)
def test_ktos_partner_is_the_next_answer_to_another_prompt(prompts, partners):
    own = task("kto")
    some = [
        {"prompt": torch.tensor([ord(p)]), "answer": torch.tensor([1000 + i]), "good": torch.tensor(True)}
        for i, p in enumerate(prompts)
    ]
    some = [{**e, "answer_labels": e["answer"]} for e in some]
    batch = own.collate(some)
    assert batch["other_ids"][:, 0].tolist() == [ord(p) for p in prompts]
    answers = [int(labels[labels >= 0]) - 1000 for labels in batch["other_labels"]]
    assert "".join(prompts[i] for i in answers) == partners
    assert all(a != i for i, a in enumerate(answers))
    for i, a in enumerate(answers):  # the nearest such row
        between = [(i + k) % len(prompts) for k in range(1, (a - i) % len(prompts))]
        assert all(prompts[j] == prompts[i] for j in between)


def test_a_row_alone_has_no_partner_and_z_is_zero():
    own, found = task("kto"), model(6)
    batch = own.collate(examples(own)[:1])
    assert "other_ids" not in batch and own._z(found, batch) == 0.0


def test_odds_near_certainty_and_far_from_it():
    p = torch.tensor([-1e-9, -1e-4, -0.1, -0.7, -3.0, -60.0], dtype=torch.float64, requires_grad=True)
    found = log_odds(p)
    expected = [float(x) - math.log(-math.expm1(float(x))) for x in p.detach()]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), p)
    assert slope.tolist() == pytest.approx([-1 / math.expm1(float(x)) for x in p.detach()], rel=1e-9)
    assert torch.isfinite(log_odds(torch.zeros(1))).all()


STARTS = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_step_is_at_the_reference(name, init, dropout):
    found = models.llama(vocab_size=len(tiny.tokenizer()), attention_dropout=0.2)
    veneer.attach(found, "lora", rank=2, init=init, dropout=dropout)
    own = task(name)
    loss, n = own.loss(found.train(), own.collate(examples(own)))
    assert float(loss) / n == pytest.approx(STARTS[name], rel=1e-6 if init == "kaiming" else 1e-4)


def test_recomputed_blocks_are_without_dropout_in_the_backward_too():
    own, found = (
        task("dpo"),
        veneer.attach(models.llama(vocab_size=len(tiny.tokenizer()), attention_dropout=0.5), "lora", rank=2),
    )
    models.randomise(found)
    batch = own.collate(examples(own))
    plain = gradients(found, own.loss(found.train(), batch)[0])
    found.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []
    found.model.layers[0].mlp.register_forward_pre_hook(lambda *call: passes.append(1))
    again = gradients(found, own.loss(found.train(), batch)[0])
    torch.testing.assert_close(again, plain)
    assert len(passes) == 3  # the model's, the base's, and the recomputed one


def test_a_trained_head_gets_the_same_gradients_as_from_whole_logits():
    own = task("orpo")
    found = models.llama(vocab_size=len(tiny.tokenizer())).double()
    batch = own.collate(examples(own))
    (by_rows,) = torch.autograd.grad(own.loss(found, batch)[0], found.lm_head.weight)
    seen = probabilities(found, batch)
    total = 0.0
    for i in range(3):
        (w, n), (v, m) = seen[i], seen[i + 3]
        _, by_w, by_v = oracle.orpo(w.item(), v.item(), 0, 0, n, m)
        total = total + by_w * w + by_v * v
    (whole,) = torch.autograd.grad(total, found.lm_head.weight)
    torch.testing.assert_close(by_rows, whole, rtol=1e-8, atol=1e-12)


def test_figures_of_the_base_are_even_and_those_of_an_adapter_are_exact():
    own, found = task("dpo"), model()
    some = examples(own)
    figures = {f.name: f.value for f in own.measure(found, some, batch=2)}
    batch = own.collate(some)
    policy, reference = found(batch["input_ids"]).logits, None
    with veneer.using(found):
        reference = found(batch["input_ids"]).logits
        even = {f.name: f.value for f in own.measure(found, some, batch=2)}
    p, q = policy.log_softmax(-1), reference.log_softmax(-1)
    learned = batch["labels"] != -100
    kl = (p.exp() * (p - q)).sum(-1)[learned]
    assert figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-9)
    at = batch["labels"].clamp(min=0)[..., None]
    gained = (((p - q).gather(-1, at)[..., 0]) * learned).sum(1).view(2, -1)
    assert figures["margin"] == pytest.approx(float(0.1 * (gained[0] - gained[1]).mean()), rel=1e-9)
    assert figures["accuracy"] == pytest.approx(float((gained[0] > gained[1]).double().mean()))
    assert figures["loss"] == pytest.approx(float(own.loss(found, batch)[0]) / 3, rel=1e-9)
    assert even["accuracy"] == 0.5 and even["margin"] == even["kl"] == 0.0
    assert even["loss"] == pytest.approx(math.log(2), rel=1e-6)


# -- rows ------------------------------------------------------------------------------------------

ASK, ANSWER, WORSE = "Where?", "Here.", "Nowhere."
USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", ASK), ("assistant", ANSWER), ("assistant", WORSE))
)
SHARED = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
TALKS = {
    "implicit": ("pairs", SHARED),
    "explicit": ("prompt-pairs", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    "ultra": ("prompt-pairs", {"prompt": ASK, **SHARED}),
    "single messages": ("messages-pairs", {"messages": [USER], "chosen": GOOD, "rejected": BAD}),
    "alpaca": ("instruction-pairs", {"instruction": ASK, "chosen": ANSWER, "rejected": WORSE}),
    "intel": ("question-pairs", {"question": ASK, "chosen": ANSWER, "rejected": WORSE}),
    "argilla": (
        "instruction-responses",
        {"instruction": ASK, "chosen_response": ANSWER, "rejected_response": WORSE},
    ),
    "sharegpt": (
        "conversations-pairs",
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": ANSWER},
            "rejected": {"from": "gpt", "value": WORSE},
        },
    ),
}


@pytest.mark.parametrize(("kind", "columns"), TALKS.values(), ids=TALKS)
def test_every_form_of_a_conversation_gives_the_same_tokens(kind, columns):
    own = task("dpo")
    expected = own.encode(row(SHARED, "pairs")).content
    found = own.encode(row(columns, kind)).content
    assert torch.equal(found.prompt, expected.prompt)
    for a, b in zip(found.answers, expected.answers, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
    decoded = tiny.tokenizer().decode(found.answers[0].ids)
    assert ANSWER in decoded and decoded.endswith(tiny.END) and ASK not in decoded


def test_of_an_answer_of_several_turns_the_assistants_are_learned():
    talk = [USER, GOOD, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    content = task("dpo").encode(row({"chosen": talk, "rejected": [*talk[:1], BAD]}, "pairs")).content
    answer = content.answers[0]
    learned = tiny.tokenizer().decode(answer.ids[answer.labels != -100])
    assert learned == f"{ANSWER}{tiny.END}So.{tiny.END}"
    assert "Why?" in tiny.tokenizer().decode(answer.ids)


def test_texts_share_their_beginning():
    own = task("dpo")
    shared = {"chosen": "Q: a b\nA: yes", "rejected": "Q: a b\nA: no"}
    given = {"prompt": "Q: a b\nA:", "chosen": " yes", "rejected": " no"}
    one, other = own.encode(row(shared, "pairs")).content, own.encode(row(given)).content
    assert torch.equal(one.prompt, other.prompt)
    assert torch.equal(one.answers[1].ids, other.answers[1].ids)


def test_systems_tools_and_histories_stand_in_the_prompt():
    own, base = task("dpo"), {"chosen": ANSWER, "rejected": WORSE}
    columns = {"instruction": ASK, "input": "More.", "system": "Be kind.", "history": [["a", "b"]], **base}
    text = tiny.tokenizer().decode(own.encode(row(columns, "instruction-pairs")).content.prompt)
    assert all(part in text for part in ("Be kind.", "### user\na", f"{ASK}\nMore."))
    columns = {"question": ASK, "system": "Be kind.", **base}
    assert "Be kind." in tiny.tokenizer().decode(own.encode(row(columns, "question-pairs")).content.prompt)


@pytest.mark.parametrize(
    ("kind", "columns", "good"),
    [
        ("prompt-judged", {"prompt": "a", "completion": " b", "label": True}, True),
        ("prompt-judged", {"prompt": [USER], "completion": [GOOD], "label": "false"}, False),
        ("instruction-output-judged", {"instruction": ASK, "output": ANSWER, "label": 1}, True),
        (
            "conversations-judged",
            {
                "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}],
                "label": 0,
            },
            False,
        ),
        ("messages-judged", {"messages": [USER, GOOD], "label": True}, True),
    ],
)
def test_single_answers_have_a_label(kind, columns, good):
    own = task("kto")
    (found,) = own.pieces(own.encode(row(columns, kind)), 64)
    assert bool(found["good"]) is good and tiny.tokenizer().decode(found["answer"]).endswith(tiny.END)


@pytest.mark.parametrize(
    ("name", "kind", "columns", "text"),
    [
        ("dpo", "prompt-pairs", {"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' must be an"),
        ("dpo", "prompt-pairs", {"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' must be text"),
        ("dpo", "pairs", {"chosen": "yes", "rejected": "no"}, "share no prompt"),
        (
            "dpo",
            "pairs",
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Why?"}, BAD]},
            "prompts of 'chosen' and 'rejected' differ: message 1 must be an answer, got a message of 'user'",
        ),
        ("kto", "prompt-judged", {"prompt": "a", "completion": "b", "label": 0.5}, "label must be true or"),
        ("kto", "prompt-judged", {"prompt": "a", "completion": "b", "label": "good"}, "label must be true"),
        ("kto", "messages-judged", {"messages": [USER], "label": True}, "must end with an answer"),
    ],
)
def test_rows_that_cannot_be_read_are_named(name, kind, columns, text):
    with pytest.raises(DataError, match=f"here: .*{text}"):
        task(name).encode(row(columns, kind))


@pytest.mark.parametrize("chosen", ["", "  ", " same"])
def test_equal_and_empty_answers_teach_nothing(chosen):
    for name in NAMES:
        own, given = task(name), row({"prompt": "a", "chosen": chosen, "rejected": " same"})
        assert own.pieces(own.encode(given), 64) == []
        (sentence,) = own.opening({"train": [given]})
        assert sentence == "1 rows have an empty answer, or answers that are equal: here"


def test_a_cut_keeps_answers_and_the_same_prompt_for_both():
    own = task("dpo")
    whole = own.encode(row({"prompt": tiny.text(1, 40), "chosen": " sat", "rejected": " ran on a mat"}))
    (one,) = own.pieces(whole, 16)
    full = whole.content
    assert torch.equal(one["chosen"], full.answers[0].ids) and torch.equal(
        one["rejected"], full.answers[1].ids
    )
    n = len(one["prompt"])
    assert own.size(one) == 16 and torch.equal(one["prompt"], full.prompt[-n:])
    assert own.size(own.pieces(whole, 4)[0]) == 4


def test_settings_and_texts_that_do_not_fit(tmp_path):
    for name in NAMES:
        with pytest.raises(ConfigError, match="beta must be above 0, got 0"):
            task(name, beta=0.0)
    with pytest.raises(DataError, match="got plain text in here; texts can be given as known= only"):
        task("dpo").check_rows([Row("text", {"text": "a"}, "here")])
    with pytest.raises(DataError, match="label must be true in some rows and false in others, got True in"):
        task("kto").opening(
            {"train": [row({"prompt": "a", "completion": "b", "label": True}, "prompt-judged")]}
        )
    with pytest.raises(ConfigError, match=r"label_smoothing must be below 0\.5 for kind 'robust'"):
        one = torch.ones(2)
        task("dpo", kind="robust").losses(Scores(one, one, one), 0.5)
    base = tiny.base(tmp_path / "base")
    tiny.jsonl(tmp_path / "d.jsonl", *ROWS * 8)
    run = {"model": str(base), "task": "dpo", "data": str(tmp_path / "d.jsonl"), "out": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="method must be an adapter, got 'full'"):
        fit(Run.from_dict({**run, "method": "full", "steps": 1, "device": "cpu"}), progress=False)
    tiny.jsonl(tmp_path / "d.jsonl", *ROWS * 4, *[{**ROWS[0], "chosen": ROWS[0]["rejected"]}] * 8)
    why = r"rows have nothing to learn \(an empty answer, or equal answers\): .* remove or correct them"
    with pytest.raises(DataError, match=why):
        fit(Run.from_dict({**run, "steps": 1, "device": "cpu"}), progress=False)
    with pytest.raises(ConfigError, match="label_smoothing has no effect on task 'ipo'"):
        Run.from_dict({**run, "task": "ipo", "label_smoothing": 0.1})


def test_a_run_reports_pairs_and_forgetting_of_plain_text(tmp_path):
    """The whole way: a run learns to prefer, and forgetting is measured on texts."""
    base = tiny.base(tmp_path / "base")
    rows = [{"prompt": tiny.text(i, 4), "chosen": " the cat sat", "rejected": " dogs ran"} for i in range(40)]
    tiny.jsonl(tmp_path / "pairs.jsonl", *rows)
    (tmp_path / "known.txt").write_text(tiny.text(5, 200), encoding="utf-8")
    run = {
        "model": str(base),
        "task": "dpo",
        "data": str(tmp_path / "pairs.jsonl"),
        "known": str(tmp_path / "known.txt"),
        "out": str(tmp_path / "run"),
        "length": 48,
        "steps": 6,
        "batch": 4,
        "lr": 5e-3,
        "eval_every": 3,
        "device": "cpu",
        "precision": "fp32",
    }
    fit(Run.from_dict(run), progress=False)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"]["valid"] == pytest.approx(math.log(2), abs=1e-6)
    assert results["after"]["valid"] < 0.6 and results["after"]["known"] != results["before"]["known"]
    lines = tiny.metrics(tmp_path / "run")
    first = next(line for line in lines if line.get("loss") is not None)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    last = [line for line in lines if "valid_accuracy" in line][-1]
    assert last["valid_accuracy"] == 1.0 and last["valid_margin"] > 0 and last["valid_kl"] > 0
    assert last["known_bpb"] > 0
    assert results["examined"]["worst"][0].keys() == {"input", "truth", "answer", "loss"}


def test_every_task_states_its_objective():
    for name in NAMES:
        assert get(name).METRIC.name == "loss" and get(name).REFERENCE == (name not in ("orpo", "simpo"))
