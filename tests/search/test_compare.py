"""A comparison from texts to its page: kills, two processes, resumption, bad input."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from pathlib import Path

import pytest
from support import tiny

from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.files import read_json
from veneer.search.compare import compare as comparing
from veneer.search.compare import contenders, training
from veneer.search.compare.compare import compare
from veneer.search.compare.settings import Comparison
from veneer.search.compare.training import joined
from veneer.search.decide.trial import Point
from veneer.tasks import Metric
from veneer.train.errors import Diverged
from veneer.train.folder import layout
from veneer.train.run import Run
from veneer.verbs.search import compare as verb

NOT_SHARED = ("lr", "eval_every", "save_every", "out", "report")


def settings(folder, **changed):
    own = {"options": {"rank": 2}, "steps": 16, "accumulate": 1, "eval_windows": 2, "compile": "off"}
    given = tiny.settings(folder, **{**own, "test": str(folder / "valid.txt"), **changed})
    return {k: v for k, v in given.items() if k not in NOT_SHARED}


def small(folder, **changed):
    own = {"methods": ("lora", "lora-mlp"), "seeds": 2, "durations": (0.5, 0.25), "together": 1}
    return Comparison(**{**own, "out": str(folder / "compared"), **changed})


class Fake:
    """Trainings that write the files of a run at once: a bowl over log2(lr) around `best`."""

    def __init__(self, best=1.5e-3, limit=math.inf, die_at=0):
        self.best, self.limit, self.die_at, self.calls = best, limit, die_at, []
        self.lock = threading.Lock()

    def __call__(self, run, step):
        with self.lock:
            self.calls.append((Path(run.out).name, step))
            if len(self.calls) == self.die_at:
                raise KeyboardInterrupt
        out = Path(run.out)
        (out / layout.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        if run.lr > self.limit:
            raise Diverged("5 steps in a row were skipped\nmore", out)
        end = 1 + math.log2(run.lr / self.best) ** 2 / 10 + run.seed / 100 + (run.to == "mlp") / 2
        at = [s for s in range(step + 1) if s % run.eval_every == 0 or s == step]
        value = {s: end + 1 - s / run.steps for s in at}
        lines = [{"step": s, "valid_bpb": v, "known_bpb": 1.0, "seconds": s / 10} for s, v in value.items()]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if step == run.steps:
            ends = {"before": {"valid": end + 1, "test": end + 1}, "after": {"valid": end, "test": end}}
            pair = {"before": end + 1, "after": end, "text": "test"}
            sizes = {"trainable_parameters": 10, "adapter_bytes": 40, "steps": step}
            own = {**ends, "learned": pair, "forgotten": {"before": 1.0, "after": 1.1}, **sizes}
            layout.put(out / "results.json", own)


@pytest.fixture
def fake(monkeypatch):
    """Trainings and dials that take no time."""
    made = Fake()
    dial = {"recommended": 1.0, "points": [{"strength": 1.0, "target_bpb": 1.0, "known_bpb": 1.1}]}
    monkeypatch.setattr(training, "WAIT", 0.05)
    monkeypatch.setattr(training, "fit_until", lambda run, step, shared: made(run, step))
    monkeypatch.setattr(
        comparing, "Judge", lambda run, voice: type("J", (), {"dial": lambda self, t: dial})()
    )
    return made


def same(found, other):
    assert json.dumps(found["methods"]) == json.dumps(other["methods"])
    assert (found["verdicts"], found["best"]) == (other["verdicts"], other["best"])


def test_the_table_has_every_contender_with_its_best_rate(tmp_path, fake):
    found = compare(Run.from_dict(settings(tmp_path)), small(tmp_path), progress=False)
    lora, mlp = found["methods"]
    assert (lora["label"], mlp["label"]) == ("lora", "lora-mlp")
    assert abs(math.log2(lora["lr"] / fake.best)) <= 0.5 and not lora["on_edge"]
    assert lora["values"] == pytest.approx([lora["values"][0], lora["values"][0] + 0.01])
    assert lora["score"]["n"] == 2 and lora["score"]["low"] < lora["score"]["mean"] < lora["score"]["high"]
    assert [p["steps"] for p in lora["front"]] == [4, 8, 16] and lora["forgotten"]["mean"] == pytest.approx(
        0.1
    )
    assert lora["steps_to_reference"]["mean"] == pytest.approx(14.4, abs=0.3) and mlp["reached"] == 0
    dropped = [t for t in lora["tried"] if t["state"] == "dropped"]
    assert dropped and all(" of the steps" in t["why"] for t in dropped)
    assert found["best"] == ["lora"] and "lora beats lora-mlp" in found["verdicts"][0]["sentence"]
    assert not list((tmp_path / "compared" / "trials").glob("*/checkpoints"))


def test_every_trial_is_trained_once_to_each_rung(tmp_path, fake):
    compare(Run.from_dict(settings(tmp_path)), small(tmp_path), progress=False)
    assert max(Counter(fake.calls).values()) == 1
    work = sum(dict(sorted(fake.calls, key=lambda c: c[1])).values())
    assert work < 0.8 * 16 * len({name for name, _ in fake.calls})


def test_a_killed_comparison_goes_on_to_the_same_table(tmp_path, fake):
    run = Run.from_dict(settings(tmp_path))
    whole = compare(run, small(tmp_path, out=str(tmp_path / "whole")), progress=False)
    n, fake.calls = len(fake.calls), []
    for die_at in (3, 9, n):
        fake.die_at = die_at
        with pytest.raises(KeyboardInterrupt):
            compare(run, small(tmp_path), progress=False)
    fake.die_at = 0
    same(compare(run, small(tmp_path), progress=False), whole)
    assert len(fake.calls) == n + 3  # what was killed is tried again, and nothing else
    assert len(compare(run, small(tmp_path), progress=False)["methods"]) == 2 and len(fake.calls) == n + 3


def test_two_processes_on_one_journal_repeat_no_work(tmp_path, fake):
    run, found, errors = Run.from_dict(settings(tmp_path)), [], []
    whole = compare(run, small(tmp_path, out=str(tmp_path / "whole")), progress=False)
    fake.calls = []

    def work():
        try:
            found.append(compare(run, small(tmp_path), progress=False))
        except BaseException as e:
            errors.append(repr(e))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert (errors, len(found), max(Counter(fake.calls).values())) == ([], 2, 1)
    for one in found:
        same(one, whole)


def test_a_divergence_is_recorded(tmp_path, fake):
    fake.limit = 3e-4
    found = compare(Run.from_dict(settings(tmp_path)), small(tmp_path), progress=False)
    lora = found["methods"][0]
    states = {t["lr"]: (t["state"], t["why"]) for t in lora["tried"]}
    assert states[4e-4] == ("diverged", "5 steps in a row were skipped") and lora["lr"] == 2e-4
    fake.limit = 0.0
    none = compare(
        Run.from_dict(settings(tmp_path)), small(tmp_path, out=str(tmp_path / "b")), progress=False
    )
    assert none["best"] == [] and none["methods"][0]["lr"] is None and none["methods"][0]["score"] is None


def test_another_comparison_in_the_folder_is_refused(tmp_path, fake):
    run = Run.from_dict(settings(tmp_path))
    compare(run, small(tmp_path), progress=False)
    with pytest.raises(ConfigError, match=r"holds another search:\n  seeds: 2 -> 3\nchoose another folder"):
        compare(run, small(tmp_path, seeds=3), progress=False)
    with pytest.raises(ConfigError, match="is not empty and holds no search; choose another folder"):
        compare(run, small(tmp_path, out=str(tmp_path)), progress=False)


def test_a_folder_from_before_a_setting_existed_goes_on(tmp_path, fake):
    run = Run.from_dict(settings(tmp_path))
    compare(run, small(tmp_path), progress=False)
    config = Path(small(tmp_path).out) / "config.json"
    found = json.loads(config.read_text())
    del found["run"]["add_tokens"], found["search"]["rates"]
    config.write_text(json.dumps(found))
    compare(run, small(tmp_path), progress=False)


def test_missing_parts_are_set_aside_and_said(tmp_path, fake, capsys):
    rows = [{"text": tiny.text(i, 40)} for i in range(40)]
    data = tiny.jsonl(tmp_path / "rows.jsonl", *rows)
    given = settings(tmp_path, data=str(data), test=(), valid=())
    found = compare(Run.from_dict(given), small(tmp_path))
    assert (
        "set aside from data: 4 rows as test text and 4 rows as valid text; 32 rows are" in found["notes"][0]
    )
    parts = {p.stem: p.read_text().splitlines() for p in (tmp_path / "compared" / "texts").iterdir()}
    assert {k: len(v) for k, v in parts.items()} == {"train": 32, "valid": 4, "test": 4}
    assert len({line for some in parts.values() for line in some}) == 40
    with pytest.raises(ConfigError, match="leaves no text to choose rates on; give valid"):
        compare(Run.from_dict({**given, "valid": "none"}), small(tmp_path, out=str(tmp_path / "c")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": ("lora", "lara")}, "lara: unknown method; did you mean 'lora'?"),
        ({"methods": ("lora/sgd",)}, "lora/sgd: unknown optimiser 'sgd'"),
        ({"methods": ("ia3/lorapro",)}, "needs factors"),
        ({"methods": ("lora:renk=4",)}, "'renk=4' must be option=value; did you mean 'rank'?"),
        ({"methods": ("lora:rank=x",)}, "rank must be a whole number, got 'x'"),
        ({"rates": 4}, "rates must be 5 or more, got 4"),
        ({"seeds": 0}, "seeds must be 1 or more, got 0"),
        ({"durations": (0.5, 1.0)}, "durations must be between 0 and 1"),
        ({"centre": {"oft": 1e-3}}, "centre: 'oft' is not compared; add it to methods"),
        ({"workers": 2}, "workers=2 needs engine='ray'"),
        ({"methods": ()}, "methods must name a contender, got none"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, fake, changed, message):
    with pytest.raises(ConfigError) as e:
        compare(Run.from_dict(settings(tmp_path)), small(tmp_path, **changed), progress=False)
    assert message in str(e.value) and fake.calls == []


def test_a_contender_may_name_options():
    run = Run(data="a.txt", options={"rank": 2, "alpha": 4.0}, rank_pattern={"q_proj": 1})
    found = contenders.runs(run, ["lora:rank=16", "full:weight_decay=0.1", "ia3", "dora/loraplus:rank=3"])
    ranked, full, ia3, both = found.values()
    assert ranked.options == {"rank": 16, "alpha": 4.0} and ranked.rank_pattern == {"q_proj": 1}
    assert (full.method, full.weight_decay, full.options, full.rank_pattern) == ("full", 0.1, {}, {})
    assert (ia3.method, ia3.options) == ("ia3", {})
    assert (both.method, both.optimiser, both.options["rank"]) == ("dora", "loraplus", 3)


def test_time_in_one_pass_is_shared():
    metric = Metric("bpb")
    lines = [{"step": s, "valid_bpb": 1.0, "seconds": t} for s, t in ((0, 0.0), (4, 8.0), (8, 10.0))]
    alone = joined((), lines[:2], metric, 1)
    assert alone == (Point(0, 1.0, 0.0), Point(4, 1.0, 8.0))
    assert joined(alone, lines, metric, 4)[2] == Point(8, 1.0, 8.5)
    assert joined((), lines, metric, 4)[1] == Point(4, 1.0, 2.0)


def test_the_command_trains_and_writes_a_page(tmp_path, capsys):
    given, out = settings(tmp_path, steps=8), tmp_path / "compared"
    line = ["compare", "--methods", "lora", "--seeds", "2", "--durations", "0.5", "0.25", "--rank", "2"]
    for name in ("model", "data", "valid", "test", "known", "steps", "batch", "length"):
        line += [f"--{name}", str(given[name])]
    line += ["--eval-windows", "2", "--precision", "fp32", "--centre", "lora=0.02"]
    assert main([*line, "--out", str(out), "--compile", "off"]) == 0
    shown = capsys.readouterr()
    assert "1 contender, 8 trials: 34 steps, as many as 4.25 full trainings, about" in shown.err
    assert "4 trials in one pass take" in shown.err and "lora has the best mean score" in shown.out
    page = (out / "report.html").read_text()
    assert all(word in page for word in ("Scores", "Learning and forgetting", "every trial", "forecast"))
    (row,) = read_json(out / "results.json")["methods"]
    assert row["memory_bytes"] > 0 and row["score"]["n"] == 2
    assert len(row["front"][-1]["points"]) == 6 and row["front"][-1]["known"] > 0


def test_results_are_a_table_for_people(tmp_path, fake):
    found = compare(Run.from_dict(settings(tmp_path)), small(tmp_path), progress=False)
    lines = verb.text({**found, "folder": "f"}).splitlines()
    assert lines[0].split()[:3] == ["method", "rate", "score"] and lines[1].startswith("lora ")
    assert lines[4].startswith("lora beats lora-mlp (lora - lora-mlp: -0.5")
    assert lines[-2].endswith("over 2 seeds, and beats every other contender by more than the noise.")
