"""Several runs trained side by side are the runs that each would have been alone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import metrics, settings

import veneer
from veneer.adapt.attached import base_parameters
from veneer.cli.frame import main
from veneer.errors import ConfigError
from veneer.ops import spans
from veneer.runs import shared as sharing
from veneer.train.errors import Interrupted
from veneer.train.loop import together
from veneer.train.loop.step import Learner
from veneer.train.run import Run


def run(folder, name, **changed):
    return Run.from_dict(
        settings(folder, options={"rank": 3}, out=str(folder / name), compile="off", **changed)
    )


def different(folder):
    """Runs that have little in common: methods, rates, optimisers, batches, lengths and numbers of steps."""
    return [
        run(folder, "plain", steps=5),
        replace(
            run(folder, "dora", steps=7, batch=3, length=24, seed=3),
            method="dora",
            lr=3e-3,
            optimiser="loraplus",
        ),
        replace(
            run(folder, "gains", steps=6, accumulate=1, label_smoothing=0.4),
            method="ia3",
            options={},
            lr=2e-2,
        ),
    ]


def adapter(folder):
    path = next((folder / "adapter").glob("*.safetensors"))
    return load_file(path)


def test_each_learns_what_it_learns_alone(tmp_path):
    runs = different(tmp_path)
    found = veneer.fit_many([replace(r, out=f"{r.out}-many") for r in runs], progress=False)
    for r, result in zip(runs, found, strict=True):
        alone = veneer.fit(r, progress=False)
        assert result.folder.name == f"{alone.folder.name}-many"
        torch.testing.assert_close(adapter(result.folder), adapter(alone.folder), rtol=1e-3, atol=1e-5)
        assert result.learned.after == pytest.approx(alone.learned.after, rel=1e-4)
        lines = zip(metrics(result.folder), metrics(alone.folder), strict=True)
        for many, one in lines:
            assert many == {
                k: pytest.approx(v, rel=1e-3) if isinstance(v, float) else v for k, v in one.items()
            }


def test_ranks_apart_learn_what_they_learn_alone_and_share_texts_and_base(tmp_path, monkeypatch):
    """Plain low-rank changes are added by spans of rows; the third run reads another text."""
    added, loaded, add, load = [], [], spans.add, sharing.for_task
    monkeypatch.setattr(spans, "add", lambda *given, **own: added.append(given[2]) or add(*given, **own))
    monkeypatch.setattr(sharing, "for_task", lambda *given: loaded.append(given) or load(*given))
    runs = [replace(run(tmp_path, f"r{r}", steps=4), options={"rank": r}) for r in (1, 4)]
    runs.append(run(tmp_path, "other", steps=4, data=str(tmp_path / "known.txt")))
    found = veneer.fit_many([replace(r, out=f"{r.out}-many") for r in runs], progress=False)
    assert len(loaded) == 1 and {s.own for s in added[0]} == {1, 2, 3}
    monkeypatch.undo()
    for r, result in zip(runs, found, strict=True):
        alone = veneer.fit(r, progress=False)
        torch.testing.assert_close(adapter(result.folder), adapter(alone.folder), rtol=1e-4, atol=1e-6)
        kept = [json.loads((f.folder / "config.json").read_text()) for f in (result, alone)]
        assert kept[0]["data"] == kept[1]["data"] and kept[0]["notes"] == kept[1]["notes"]


def test_a_stopped_training_goes_on_in_every_run(tmp_path, monkeypatch):
    runs = [run(tmp_path, "a", steps=4), run(tmp_path, "b", steps=6, seed=1)]
    whole = veneer.fit_many([replace(r, out=f"{r.out}-whole") for r in runs], progress=False)
    real, calls = together.step, []

    def interrupted(bank, work):
        calls.append(len(work))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(bank, work)

    monkeypatch.setattr(together, "step", interrupted)
    with pytest.raises(
        Interrupted, match=r"stopped by signal 15 after step 3 of 4; saved in .*a: resume with resume=True"
    ):
        veneer.fit_many(runs, progress=False)
    assert calls == [2, 2, 2]
    again = veneer.fit_many([replace(r, resume=True) for r in runs], progress=False)
    assert calls == [2, 2, 2, 2, 1, 1]  # the shorter run is over first
    for r, w in zip(again, whole, strict=True):
        assert all(torch.equal(t, adapter(w.folder)[n]) for n, t in adapter(r.folder).items())
    finished = veneer.fit_many([replace(r, resume=True) for r in runs], progress=False)
    assert [r.metrics for r in finished] == [r.metrics for r in again] and len(calls) == 6


def test_one_base_is_held_and_one_run_that_is_not_finite_skips_alone(tmp_path, monkeypatch):
    seen = []
    real = Learner.finish

    def spoiled(self, micro, loss, rate):
        seen.append(self.model)
        if len({id(m) for m in seen}) == 2 and len(seen) == 2:
            for part in self.parts:
                part.parameter.grad.fill_(float("nan"))
        return real(self, micro, loss, rate)

    monkeypatch.setattr(Learner, "finish", spoiled)
    results = veneer.fit_many(
        [run(tmp_path, "a", steps=2), run(tmp_path, "b", steps=2, seed=1)], progress=False
    )
    assert [r.metrics["skipped_steps"] for r in results] == [0, 1]
    first, second = seen[:2]
    shared = base_parameters(first)
    assert first is not second and all(
        p.data_ptr() == shared[n].data_ptr() for n, p in base_parameters(second).items()
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text())["run"]["compile"] == "off"


def test_a_quantised_base_is_shared_too(tmp_path):
    runs = [
        replace(run(tmp_path, n, steps=2, seed=i), quantise="nf4", precision="bf16")
        for i, n in enumerate("ab")
    ]
    results = veneer.fit_many(runs, progress=False)
    alone = veneer.fit(replace(runs[1], out=str(tmp_path / "alone")), progress=False)
    assert results[1].learned.after == pytest.approx(alone.learned.after, rel=1e-2)


def file(folder, name, **changed):
    """A run's settings as YAML, which JSON is."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings(folder, options={"rank": 3}, out=str(folder / name), **changed)))
    return str(path)


def test_files_of_settings_are_trained_by_the_command_line(tmp_path, capsys):
    files = [file(tmp_path, "a"), file(tmp_path, "b", seed=1, method="dora")]
    assert main(["fit-many", *files, "--steps", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [t["folder"] for t in told] == [str(tmp_path / n) for n in "ab"]
    assert [(t["method"], t["steps"]) for t in told] == [("lora", 2), ("dora", 2)]
    assert main(["fit-many", *files, "--steps", "2"]) == 2
    assert "resume" in capsys.readouterr().err
    assert main(["fit-many", *files, "--steps", "2", "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"== {tmp_path / 'a'}\nlearned" in out and f"== {tmp_path / 'b'}\nlearned" in out


def test_files_that_do_not_go_together_are_refused_by_the_command_line(tmp_path, capsys):
    a = file(tmp_path, "a")
    assert main(["fit-many", a, a]) == 2
    assert (
        f"out must differ between runs, got {tmp_path / 'a'} twice; give each its own"
        in capsys.readouterr().err
    )
    assert main(["fit-many", a, "--compile", "on"]) == 2
    assert "compile must be 'off' or 'auto' for runs trained together, got 'on'" in capsys.readouterr().err
    assert main(["fit-many", a, "--out", "x"]) == 2
    assert "No such option: --out" in capsys.readouterr().err
    assert main(["fit-many", str(tmp_path / "gone.yaml")]) == 2
    assert main(["fit-many"]) == 2
    assert not (tmp_path / "a").exists()


def refusal(runs):
    with pytest.raises(ConfigError) as e:
        veneer.fit_many(runs, progress=False)
    return str(e.value)


def test_runs_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path):
    a, b = run(tmp_path, "a"), run(tmp_path, "b")
    assert refusal([]) == "runs must be a list with a run or more, got none"
    text = refusal(
        [
            a,
            replace(b, out=a.out, precision="bf16"),
            replace(b, method="full", options={}),
            replace(b, out="c", compile="on"),
        ]
    )
    assert text.splitlines() == [
        "precision must be the same for all runs, got bf16 and fp32",
        f"out must differ between runs, got {a.out} twice; give each its own",
        "method 'full' trains the base, which the runs share; train it alone",
        "compile must be 'off' or 'auto' for runs trained together, got 'on'",
    ]
    text = refusal([a, replace(b, options={"rank": 2, "dropout": 0.1})])
    assert text == f"{b.out!r} drops inputs (dropout=0.1), which a bank cannot; attach it with dropout=0"
    text = refusal([a, replace(b, method="bat", options={"rank": 4})])
    assert text.startswith(f"{b.out!r}: bat has no normal form at model.layers.0.")
    text = refusal([a, replace(b, to=("lm_head", "q_proj"))])
    shared = "which the rows of all runs share; leave it out with exclude="
    assert text == f"{b.out!r} changes the output head lm_head, {shared}"
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
