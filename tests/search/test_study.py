"""The study judges claims by fixed rules; its measures see what was planted."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from torch import nn

import veneer
from veneer.adapt.attached import changes
from veneer.analyse.activations import linear_cka, procrustes
from veneer.analyse.intruders import intruders, n_intruders
from veneer.errors import ConfigError
from veneer.models import pretrained
from veneer.search.compare import contenders
from veneer.search.study import answers, claims, later, measures, protocol, sources
from veneer.search.study import study as studying
from veneer.search.study.answers import Diversity, diversity
from veneer.search.study.claims import FAILS, HOLDS, NOISE, UNKNOWN
from veneer.search.study.report import page
from veneer.search.study.study import study
from veneer.tasks import Metric
from veneer.tasks.text.samples import continuations
from veneer.verbs.search.study import text

METRIC = Metric("bpb", "bits per byte")
ROOT = Path(__file__).parents[2]


def row(values, known=1.1, steps=20.0, lr=1e-3, **changed):
    dial = [(0.0, 3.0, 1.0), (0.5, 2.5, 1.0 + (known - 1) / 2), (1.0, values[0], known)]
    points = [{"strength": s, "target_bpb": t, "known_bpb": k} for s, t, k in dial]
    front = {"known": known, "target": values[0], "recommended": 1.0, "points": points, "steps": 32}
    steps_to = {"mean": steps, "low": steps - 1, "high": steps + 1, "n": 3}
    measured = {"energy_rank": 90, "intruders": 5, "by_role": {"attention": 2, "mlp": 3}}
    own = {"values": values, "score": {"mean": values[0], "low": 1.0, "high": 3.0, "n": 3}, "lr": lr}
    own |= {"front": [front], "steps_to_reference": steps_to, "forgotten": {"mean": known - 1}}
    own |= {"trainable_parameters": 1000, "measures": {**measured, "cka": 0.9, "procrustes": 0.1}}
    return {**own, **changed}


def outcome(words, rows, where="prose"):
    found = {v.claim: v for v in claims.judged({where: rows}, METRIC)}
    return found[words]


FULL = row([2.0, 2.01, 1.99], known=1.2, lr=1e-4)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([2.2, 2.21, 2.19], HOLDS), ([1.8, 1.81, 1.79], FAILS), ([2.0, 2.02, 1.99], NOISE), ([2.2], UNKNOWN)],
)
def test_learning_less_is_told_by_the_interval(values, wanted):
    found = outcome("LoRA learns less than full fine-tuning", {"lora": row(values), "full": FULL})
    assert found.outcome == wanted and (wanted == UNKNOWN or "lora - full: " in found.figures)


@pytest.mark.parametrize(("known", "wanted"), [(1.05, HOLDS), (1.19, FAILS)])
def test_forgetting_is_compared_at_equal_learning(known, wanted):
    rows = {"lora": row([2.2, 2.2, 2.2], known=known), "full": FULL}
    found = outcome("LoRA forgets less at equal learning", rows)
    assert found.outcome == wanted and "full 1.1600 on known text" in found.figures
    far = outcome("LoRA forgets less at equal learning", {"lora": row([1.0, 1.0]), "full": FULL})
    assert far.outcome == UNKNOWN and "does not pass" in far.figures


def test_other_rules_hold_and_fail():
    rows = {"full": FULL, "lora": row([2.2, 2.21, 2.19]), "loraplus": row([2.2, 2.2, 2.2], steps=10.0)}
    assert outcome("LoRA+ reaches the reference sooner than tuned LoRA", rows).outcome == HOLDS
    rows["loraplus"] = row([2.2, 2.2, 2.2], steps=20.5)
    assert outcome("LoRA+ reaches the reference sooner than tuned LoRA", rows).outcome == NOISE
    rows["loraplus"]["steps_to_reference"] = None
    found = outcome("LoRA+ reaches the reference sooner than tuned LoRA", rows)
    assert (found.outcome, found.figures) == (FAILS, "steps to the reference: loraplus never, lora 20")
    rows["lora"]["steps_to_reference"] = None
    found = outcome("LoRA+ reaches the reference sooner than tuned LoRA", rows)
    assert (found.outcome, found.figures) == (UNKNOWN, "neither loraplus nor lora reached the reference")
    words = "the best LoRA rate is about 10 times full fine-tuning's"
    assert outcome(words, rows).outcome == HOLDS and "10.0 times" in outcome(words, rows).figures
    rows["lora"]["lr"] = 1e-2
    assert outcome(words, rows).outcome == FAILS
    assert outcome("full fine-tuning's change has 10 times LoRA's rank", rows).outcome == HOLDS
    assert outcome("LoRA has intruders, full fine-tuning fewer", rows).outcome == FAILS
    assert outcome("PiSSA reaches the reference sooner than tuned LoRA", rows).outcome == UNKNOWN


def test_steps_to_tuned_lora_are_read_from_the_curves_of_all_seeds(tmp_path):
    """LoRA gains 1 bit in 20 steps, evenly: 90 % of it after 18. One seed of LoRA+ is twice as fast."""
    curves = {
        "lora-0.01-s5": [(0, 3.0), (10, 2.5), (20, 2.0)],
        "lora-0.01-s6": [(0, 3.0), (10, 2.5), (20, 2.0)],
        "loraplus-0.002-s5": [(0, 3.0), (10, 2.0), (20, 1.9)],
        "loraplus-0.002-s6": [(0, 3.0), (10, 2.9), (20, 2.8)],
    }
    for key, points in curves.items():
        lines = [{"step": step, "valid_bpb": bpb, "seconds": 0.0} for step, bpb in points]
        file = tmp_path / "trials" / key / "metrics.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    methods = [{"label": label, "lr": lr} for label, lr in (("lora", 0.01), ("loraplus", 0.002))]
    methods.append({"label": "pissa", "lr": None})
    found = {"metric": METRIC._asdict(), "seed": 5, "seeds": 2, "methods": methods}
    steps = later.steps_to_lora(tmp_path, found)
    assert {label: (s["mean"], s["n"]) for label, s in steps.items()} == {"lora": (18, 2), "loraplus": (9, 1)}
    assert later.steps_to_lora(tmp_path, {**found, "methods": methods[1:]}) == {}
    rows = {label: {**row([2.2, 2.2]), later.STEPS: s} for label, s in steps.items()}
    shown = outcome("LoRA+ reaches 90 % of LoRA's gain sooner (added later)", rows).figures
    assert shown == "steps to 90 % of LoRA's gain: loraplus 9, lora 18"


def test_alike_means_that_the_interval_covers_zero():
    rows = {protocol.LOW: row([2.0, 2.01]), protocol.HIGH: row([2.0, 2.02])}
    assert outcome("low rank suffices near the pretraining data", rows).outcome == HOLDS
    rows[protocol.HIGH] = row([1.5, 1.51])
    assert outcome("low rank suffices near the pretraining data", rows).outcome == FAILS
    assert outcome("high rank is needed far from it", rows, "c").outcome == HOLDS


@pytest.mark.parametrize(
    ("scores", "wanted"), [((2.2, 2.1, 2.1), HOLDS), ((2.2, 2.0, 2.4), FAILS), ((2.0, 2.3, 2.1), FAILS)]
)
def test_a_score_that_falls_with_more_parameters_is_seen(scores, wanted):
    labels = (protocol.LOW, protocol.LORA, protocol.HIGH)
    rows = {label: row([s, s + 0.01, s - 0.01]) for label, s in zip(labels, scores, strict=True)}
    found = outcome("scores do not fall with more parameters", rows)
    assert found.outcome == wanted and found.figures.count(" - ") == 2
    del rows[protocol.LORA]
    assert outcome("scores do not fall with more parameters", rows).outcome == UNKNOWN


@pytest.mark.parametrize("size", [protocol.QUICKLY, protocol.FULLY])
def test_every_contender_is_known_and_has_a_rate(size):
    for run, comparison in protocol.parts(size, "out").values():
        made = contenders.runs(run, comparison.methods)
        assert len(made) == len(comparison.methods)
        assert all(contenders.centre(one) > 0 for one in made.values())


def test_hidden_states_are_alike_up_to_rotation():
    torch.manual_seed(0)
    X = torch.randn(60, 12, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert linear_cka(X, 3 * X @ Q + 1) == pytest.approx(1)
    assert procrustes(X, X @ Q + 5) == pytest.approx(0, abs=1e-7)
    Y = torch.randn(60, 12, dtype=torch.float64)
    assert linear_cka(X, Y) < 0.5 and procrustes(X, Y) > 0.5
    K, L = ((M - M.mean(0)) @ (M - M.mean(0)).mT for M in (X, Y))
    assert linear_cka(X, Y) == pytest.approx(float((K * L).sum() / (K.norm() * L.norm())))


def test_a_trial_is_measured_by_its_weights_and_hidden_states(tmp_path):
    base = tiny.base(tmp_path / "base")
    model = pretrained.causal_lm(str(base), torch.float32, torch.device("cpu"))
    veneer.attach(model, "lora", rank=4, name="a")
    for i, (_, delta) in enumerate(changes(model, "a")):
        nn.init.normal_(delta.B, std=1.0 if i == 0 else 1e-3)
    counted = sum(one.count for one in intruders(model, "a"))
    (site, delta), *_ = changes(model, "a")
    assert n_intruders(site.weight(), delta.delta(site)) == intruders(model, "a")[0].count >= 4
    veneer.save(model, tmp_path / "trial" / "adapter", "a")
    veneer.detach(model)
    examples = [{"input_ids": torch.arange(9)}]
    task = SimpleNamespace(
        collate=lambda some: {"input_ids": torch.stack([e["input_ids"] for e in some])},
        inputs=lambda batch: batch,
        body=lambda model: model.model,
    )
    judge = SimpleNamespace(opened=(task, model, {"known": examples, "test": examples}))
    found = measures.measured(judge, tmp_path / "trial")
    assert found["intruders"] == counted and 1 <= found["energy_rank"] <= 4 and found["cka"] < 0.9999
    assert json.loads((tmp_path / "trial" / "measures.json").read_text()) == found
    assert measures.measured(None, tmp_path / "trial") == found  # measured once


def test_the_study_runs_in_parts_and_writes_its_page(tmp_path, monkeypatch, capsys):
    ran = []

    def compare(run, comparison, progress):
        ran.append(run.data[0])
        methods = [{"label": n, **row([2.0, 2.01, 1.99])} for n in ("full", "lora")]
        found = {"methods": methods, "metric": METRIC._asdict(), "seed": 0, "seeds": 3}
        studying.layout.put(tmp_path / "out" / run.data[0].split(":")[1] / "results.json", found)
        return found

    monkeypatch.setattr(studying, "compare", compare)
    monkeypatch.setattr(studying.compare_page, "write", lambda folder: [])
    monkeypatch.setattr(studying, "prepared", lambda *a: ({"lora": None}, 32, {}))
    monkeypatch.setattr(studying, "measured", lambda judge, trial, asked: row([2.0])["measures"])
    out, to = tmp_path / "out", tmp_path / "docs"
    first = study(str(out), quick=True, part="c", progress=False)
    assert (first["parts"], first["missing"], ran) == (["c"], ["prose"], ["builtin:c"])
    assert "parts still to run: prose" in text(first)
    whole = study(str(out), quick=True, to=str(to), progress=False)
    assert whole["missing"] == [] and ran[1:] == ["builtin:prose", "builtin:c"]
    made = (to / "index.md").read_text()
    assert "| LoRA Learns Less and Forgets Less | LoRA learns less" in made and "## C headers" in made
    assert made == (out / "index.md").read_text()
    with pytest.raises(
        ConfigError, match="part must be one of prose, c, ast, smollm2, got 'pros'; did you mean 'prose'"
    ):
        study(str(out), quick=True, part="pros")


def test_a_contender_that_diverged_has_a_row():
    rows = {"full": FULL, "oft": row([2.0, 2.0], score=None, measures={})}
    found = {"quick": True, "missing": [], "claims": []}
    assert "| oft |  | diverged |  |  |  |" in page(found, {"prose": rows}, METRIC)


def test_the_protocol_says_the_settings():
    words = (protocol.__doc__ or "") + (ROOT / "docs" / "study" / "protocol.md").read_text(encoding="utf-8")
    quick, full = protocol.QUICKLY, protocol.FULLY
    assert f"{full.run['steps']} steps of {full.run['batch']} windows of {full.run['length']} tokens" in words
    assert f"quick: {quick.run['steps']} steps" in words and f"with {full.comparison['seeds']} seeds" in words
    assert {protocol.LORA, protocol.HIGH, protocol.LOW, protocol.DECAY} <= set(protocol.QUICK)
    assert all(protocol.parts(size, "a").keys() == {"prose", "c"} for size in (quick, full))


# -- instructions with exact answers -----------------------------------------------------------------------


def test_instructions_have_one_right_answer_and_no_part_knows_another():
    found = sources.rows()
    assert {part: len(some) for part, some in found.items()} == sources.ROWS
    every = [row for some in found.values() for row in some]
    assert len({row.prompt for row in every}) == len(every)
    for row in every[::97]:
        source = row.prompt.removesuffix("\nast: ")
        assert ast.dump(ast.parse(source, mode="eval").body) == row.completion
    assert sources.rows() == found and sources.rows(1) != found


def test_unique_answers_are_counted_right_and_wrong_apart():
    samples = [["a", "a", "b", "c"], ["d", "d", "d", "d"]]
    found = diversity(samples, ["a".__eq__, "x".__eq__])
    assert found == Diversity(unique_right=0.5, unique_wrong=1.5, right=0.25)


def test_answers_of_an_adapter_are_exact_or_not(tmp_path, monkeypatch):
    rows, said = [sources.Asked("1 +", "yes"), sources.Asked("2 +", "no")], []

    def write(model, tokenizer, prompt, *, n, **options):
        said.append((prompt, n, options["temperature"]))
        return ["yes "] if n == 1 else ["yes", "no", "no"] * 4 + ["maybe"] * 4

    monkeypatch.setattr(answers, "continuations", write)
    found = answers.answered(nn.Linear(1, 1), tiny.tokenizer(), rows)
    assert (found["exact"], found["unique_right"], found["unique_wrong"]) == (0.5, 1, 2)
    assert found["right"] == pytest.approx((4 + 8) / 32)
    assert said == [("1 +", 1, 0.0), ("2 +", 1, 0.0), ("1 +", 16, 0.8), ("2 +", 16, 0.8)]


def test_samples_of_one_prompt_differ_and_the_same_call_repeats(tmp_path):
    base = tiny.base(tmp_path / "base")
    model = pretrained.causal_lm(str(base), torch.float32, torch.device("cpu"))
    own = {"max_new_tokens": 6, "seed": 1, "temperature": 1.0}
    found = continuations(model, tiny.tokenizer(), "the cat", n=4, **own)
    assert len(found) == 4 and len(set(found)) > 1
    assert found == continuations(model, tiny.tokenizer(), "the cat", n=4, **own)


def test_the_part_on_instructions_is_fixed_beforehand(tmp_path):
    run, comparison = protocol.instructions(protocol.QUICKLY, str(tmp_path))
    assert {protocol.DROPOUT, protocol.DECAY, "full"} < set(comparison.methods)
    assert len((tmp_path / "ast" / "texts" / "train.jsonl").read_text().splitlines()) == 2000
    words = (ROOT / "docs" / "study" / "instructions.md").read_text(encoding="utf-8")
    assert f"{sources.ROWS['train']} of {sum(sources.ROWS.values())}" in words
    assert f"{run.batch} instructions" in words and f"{answers.EACH} samples" in words


def test_the_page_has_answers_and_claims_of_instructions():
    own = {"exact": 0.5, "right": 0.25, "unique_right": 1.0, "unique_wrong": 4.0}
    rows = {"full": row([2.0, 2.01]), "lora": row([2.0, 2.02])}
    for label, more in (("full", 0.0), ("lora", 3.0)):
        rows[label]["measures"] |= {"answers": {**own, "unique_wrong": 4.0 + more}}
    assert outcome("full fine-tuning's answers are less diverse than LoRA's", rows, "ast").outcome == HOLDS
    made = page({"quick": True, "missing": [], "claims": []}, {"ast": rows}, METRIC)
    assert "| lora | 50% | 25% | 1.0 | 7.0 |" in made and "## Instructions" in made
