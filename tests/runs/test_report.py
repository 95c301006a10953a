"""The page of a run: what it says, that it needs nothing but itself, that user text is text, and that a
browser draws it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support import laid_out, tiny

from veneer import tasks
from veneer.analyse import numbers
from veneer.analyse.page import demo_report, elements, figures, layer_plots, plots, run_page
from veneer.analyse.page import run_report as told
from veneer.analyse.page.run_record import RunRecord
from veneer.cli.frame import main
from veneer.errors import ConfigError, FormatError
from veneer.models import adapted
from veneer.runs import findings
from veneer.runs.fit import fit
from veneer.runs.report import report
from veneer.tasks.text import preview, samples
from veneer.tasks.text.bits import BITS
from veneer.train.run import Run

EVIL = '<script>"$a$"</script>&<img src=x>'
PICTURES = ("loss", "evaluations", "learning-vs-forgetting", "dial", "singular-values", "effective-ranks")
CHROMIUM = shutil.which("chromium")
ROWS = [{"prompt": f"{EVIL} {i}: ", "completion": tiny.text(i, 16)} for i in range(24)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with a report, on prompts and completions that hold HTML."""
    place = tmp_path_factory.mktemp("report")
    data = tiny.jsonl(place / "rows <b>&.jsonl", *ROWS)
    test = tiny.jsonl(place / "test.jsonl", *ROWS[:6])
    given = tiny.settings(
        place, data=str(data), test=str(test), length=128, report=True, steps=6, eval_every=2, valid=()
    )
    return fit(Run.from_dict(given), progress=False).folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def text_of(folder: Path) -> str:
    """Returns the text of the page without tags."""
    html = (folder / told.REPORT).read_text(encoding="utf-8")
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)).split())


class References(HTMLParser):
    """Tags of a page, and what its attributes refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        self.found += [
            (name, value or "")
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parsed(folder: Path) -> References:
    seen = References()
    seen.feed((folder / told.REPORT).read_text(encoding="utf-8"))
    return seen


def test_the_page_needs_nothing_but_itself(run):
    seen = parsed(run)
    assert seen.open == [] and seen.wrong == []  # every tag is closed in its order
    assert [value for _, value in seen.found if not value.startswith("#")] == []
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    html = (run / told.REPORT).read_text(encoding="utf-8")
    css = re.search(r"<style>(.*?)</style>", html, flags=re.DOTALL)[1]
    assert (
        "url(" not in css.replace("url(#", "")
        and "@import" not in css
        and "prefers-color-scheme: dark" in css
    )
    assert all(part.startswith("url(#") for part in re.findall(r"url\(.", html))
    assert '<meta name="viewport"' in html and "default-src 'none'" in html


def test_what_users_wrote_is_text(run):
    html, seen = (run / told.REPORT).read_text(encoding="utf-8"), text_of(run)
    assert "<script" not in html and "<img" not in html and "<b>" not in html
    assert EVIL in seen  # as a sample's prompt
    assert "rows <b>&.jsonl" in seen


def test_ids_within_the_page_are_its_own(run):
    html = (run / told.REPORT).read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    assert {value.removeprefix("#") for _, value in parsed(run).found} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_the_page_says_what_the_files_say(run):
    seen, r = text_of(run), results(run)
    for change in (r["learned"], r["forgotten"]):
        assert numbers.percent(change) in seen and numbers.moved(change) in seen
    for sentence in r["notes"]:
        assert " ".join(sentence.split()) in seen
    for word in (
        *r["versions"].values(),
        f"{r['trainable_parameters']:,}",
        f"{r['base_parameters']:,}",
        "resolved",
    ):
        assert word in seen
    for layer in r["layers"]:
        assert layer["site"] in seen
    for p in r["dial"]["points"]:
        assert f"{p['strength']:g} {p['target_bpb']:.3f} {p['known_bpb']:.3f}" in seen
    settings = json.loads((run / "config.json").read_text())["run"]
    assert Path(settings["model"]).is_absolute() and settings["model"] not in seen
    for name, value in {**settings, "model": Path(settings["model"]).name}.items():
        assert f"{name} {numbers.plain(value)}" in seen
    for name in PICTURES:
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert parsed(run).tags.count("svg") == len(PICTURES)


def test_the_dial_is_chosen_on_one_text_and_reported_on_another(run):
    dial = results(run)["dial"]
    assert [p["strength"] for p in dial["points"]] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    assert (dial["chosen_on"], dial["text"], dial["apart"]) == ("valid text", "test text", True)
    assert dial["points"] != dial["chosen_by"]
    r = results(run)
    base, full = dial["points"][0], dial["points"][4]
    for point, key in ((base, "before"), (full, "after")):  # the same windows as the figures above
        assert (point["target_bpb"], point["known_bpb"]) == (r[key]["test"], r[key]["known"])
    assert r["after"]["known"] != r["before"]["known"] and dial["points"][4] != dial["points"][0]


def test_short_answers_stand_before_and_after_side_by_side(tmp_path):
    """Pairs with answers of a word: no setting asks for it."""
    rows = [
        {"prompt": f"{tiny.text(i, 3)} colour: ", "completion": ("red", "black")[i % 2]} for i in range(40)
    ]
    data = str(tiny.jsonl(tmp_path / "rows.jsonl", *rows))
    given = tiny.settings(tmp_path, data=data, valid=(), report=True, length=128, steps=40, lr=2e-2)
    run = fit(Run.from_dict(given), progress=False).folder
    found = results(run)["answers"]
    assert (found["text"], found["asked"], len(found["rows"])) == ("valid", 4, 4)
    by_hand = [row["after"] == row["truth"] for row in found["rows"]]
    assert [row["right"] for row in found["rows"]] == by_hand and found["after"] == sum(by_hand) > 0
    assert found["before"] == 0 == sum(row["before"] == row["truth"] for row in found["rows"])
    seen = text_of(run)
    assert f"right answers (valid text) {found['after']} of 4 0 before" in seen
    assert "Of 4 questions of valid text the base answers 0 exactly as the text does" in seen
    note = f"right answers on valid text: 0 of 4 before, {found['after']} after"
    assert note in results(run)["notes"]
    assert "answers" not in results(long_answers(tmp_path))


def long_answers(place: Path) -> Path:
    """Returns the folder of a run on texts without a question."""
    data = str(tiny.jsonl(place / "texts.jsonl", *({"text": tiny.text(i, 40)} for i in range(20))))
    given = tiny.settings(place, data=data, valid=(), report=True, steps=1, out=str(place / "plain"))
    return fit(Run.from_dict(given), progress=False).folder


def test_the_preview_marks_what_is_learned(run):
    for pieces in results(run)["preview"]:
        whole = "".join(text for text, _ in pieces)
        learned = "".join(text for text, was in pieces if was)
        assert whole.startswith(f"{tiny.END}{EVIL}")
        assert whole.endswith(learned) and learned and EVIL not in learned
    assert elements.tokens([["<a>", False], ["b\n", True]]) == (
        '<div class="text"><span class="token">&lt;a&gt;</span><mark class="token">b↵\n</mark></div>'
    )
    assert elements.escape('\x00\x1b"\t') == "␀␛&quot;\t"
    tokenizer = tiny.tokenizer()
    ids = tokenizer("né 日 cat")["input_ids"]  # letters of several tokens each
    pieces = preview.pieces(ids, tokenizer)
    assert "".join(pieces) == "né 日 cat" and len(pieces) == len(ids) and "" in pieces


def test_samples_begin_with_the_prompt_and_end_with_the_text_itself(run):
    found = results(run)["samples"]
    assert len(found["rows"]) == samples.SAMPLES
    for row in found["rows"]:
        assert any(row["prompt"] == r["prompt"] and r["completion"].startswith(row["truth"]) for r in ROWS)
        assert row["before"] != row["after"]


def test_a_report_is_made_again_from_the_files_alone(run, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    for name in ("results.json", "metrics.jsonl", "config.json"):
        shutil.copy(run / name, again)
    assert report(str(again)) == {"report": str(again / "report.html"), "missing": []}
    first, second = ((f / told.REPORT).read_text(encoding="utf-8") for f in (run, again))
    assert second.replace(str(again), str(run)) == first


def test_without_measurements_the_page_says_how_to_get_them(run, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    measured = results(run)
    for key in ("dial", "layers", "samples", "preview", "base_parameters", "report_seconds"):
        measured.pop(key)
    (bare / "results.json").write_text(json.dumps(measured))
    assert main(["report", str(bare)]) == 0
    assert f"report: {bare}/report.html" in capsys.readouterr().out
    assert f"Not measured in this run; to measure it: veneer report {bare} --measure" in text_of(bare)
    assert main(["report", str(bare), "--prompt", "the cat <i>"]) == 0
    again = results(bare)
    assert [row["prompt"] for row in again["samples"]["rows"]] == [
        "the cat <i>"
    ] and "the cat <i>" in text_of(bare)
    for key in ("dial", "preview", "base_parameters"):
        assert again[key] == results(run)[key]
    assert [s["site"] for s in again["layers"]] == [s["site"] for s in results(run)["layers"]]


def test_without_matplotlib_the_page_comes_without_pictures(run, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (sentence,) = report(str(bare))["missing"]
    assert sentence == (
        "the report lacks pictures, because matplotlib is not installed: pip install 'veneer[plots]', then"
        f" veneer report {bare}"
    )
    assert sentence in text_of(bare) and "svg" not in parsed(bare).tags


def test_full_fine_tuning_without_test_and_known_text(tmp_path):
    given = tiny.settings(
        tmp_path, method="full", options={}, known="none", steps=2, eval_every=1, report=True, lr=1e-3
    )
    folder = fit(Run.from_dict(given), progress=False).folder
    r = results(folder)
    dial = r["dial"]
    assert (dial["chosen_on"], dial["text"], dial["apart"]) == ("valid text", "valid text", False)
    assert "of valid text that the figures above are of, which also chose the strength." in text_of(folder)
    assert {p["known_bpb"] for p in dial["points"]} == {None}
    assert "No test text was given: learning is reported on the valid text" in text_of(folder)
    assert "Forgetting was not measured" in text_of(folder)
    assert "learning-vs-forgetting" not in text_of(folder)
    assert len(r["layers"]) > 10 and not (folder / "learning-vs-forgetting.png").exists()


def test_report_false_measures_and_writes_nothing(tmp_path):
    folder = fit(Run.from_dict(tiny.settings(tmp_path, steps=1)), progress=False).folder
    assert (
        not list(folder.glob("*.png"))
        and not (folder / told.REPORT).exists()
        and "dial" not in results(folder)
    )


def test_a_signal_during_the_report_leaves_a_finished_run(tmp_path, monkeypatch):
    from veneer.train.loop.signals import Stop

    def stopped(*args, **given):
        raise Stop

    monkeypatch.setattr(findings, "examine", stopped)
    result = fit(Run.from_dict(tiny.settings(tmp_path, steps=1, report=True)), progress=False)
    assert result.metrics["steps"] == 1 and not (result.folder / told.REPORT).exists()


def test_what_is_no_finished_run_is_refused(tmp_path, run):
    with pytest.raises(ConfigError) as e:
        report(str(tmp_path))
    assert str(e.value) == f"{tmp_path}: a report needs results.json of a finished run, got other files"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ConfigError,
        match=r"a report needs results\.json of a finished run, got an unfinished run; resume it first",
    ):
        report(str(tmp_path))
    shutil.copy(run / "results.json", tmp_path)
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nbroken')
    with pytest.raises(
        FormatError, match=r"metrics.jsonl must hold one JSON object per line: .*; restore it from a copy"
    ):
        report(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "lacks"),
    [("config.json", "run, data, base"), ("results.json", "before, after, learned, forgotten")],
)
def test_a_run_with_another_file_in_its_place_is_told_so(tmp_path, run, capsys, file, lacks):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / file).write_text('{"hidden_size": 3}')
    given = json.loads((run / "config.json").read_text(encoding="utf-8"))["run"]
    said = f"{copy / file} lacks {lacks}: it is another file than it should be; restore it from a copy"
    with pytest.raises(FormatError) as e:
        fit(Run.from_dict({**given, "out": str(copy), "resume": True}), progress=False)
    assert str(e.value) == said
    with pytest.raises(FormatError) as e:
        report(str(copy))
    assert str(e.value) == said
    assert adapted.base_of(adapted.there([str(copy)])) == given["model"]  # which the adapter says too


def demo_results() -> dict[str, Any]:
    dial = [{"strength": s, "target_bpb": 2 - 0.3 * s, "known_bpb": 1 + 0.1 * s} for s in (0, 0.5, 1)]
    row = {
        "target": "prose",
        "target_bpb_before": 2.0,
        "target_bpb_after": 1.7,
        "known_bpb_before": 1.0,
        "known_bpb_after": 1.1,
        "recommended_strength": 0.5,
        "dial": dial,
        "prompt": EVIL,
        "samples": {"before": "<i>", "after": EVIL},
        "trainable_parameters": 1000,
        "adapter_bytes": 4000,
        "seconds": 75.0,
        "lr": 1e-3,
        "folder": "x",
    }
    rows = [
        {**row, "method": "full", "target_bpb_after": 1.5},
        {**row, "method": "lora"},
        {**row, "method": "loraplus", "target": "c"},
    ]
    described = {"documents": 3, "bytes": 12345, "sha256": "0" * 64}
    texts = {"prose": {"train": described, "valid": described, "test": described}, "known": described}
    return {
        "methods": rows,
        "noise_bpb": 0.03,
        "steps": 10,
        "seed": 0,
        "texts": texts,
        "versions": {"torch": "2.13.0"},
    }


def asked_results() -> dict[str, Any]:
    row = {"prompt": f"{EVIL} ==", "truth": '"AnAnswer"', "before": "<i>", "after": '"AnAnswer"'}
    known = {0: 1.0, 0.25: 1.01, 0.5: 1.02, 0.75: 1.05, 1: 1.1}
    return {
        "asked": 3,
        "right_before": 0,
        "right_after": 2,
        "dial": [{"strength": s, "right": round(2 * s), "known_bpb": v} for s, v in known.items()],
        "recommended_strength": 0.75,
        "rows": [row, row, {**row, "after": "wrong"}],
        "steps": 250,
        "trainable_parameters": 315_392,
        "adapter_bytes": 1_270_000,
        "seconds": 61.0,
        "lr": 5e-3,
        "folder": "x",
    }


def test_a_demo_shows_answers_before_and_after(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**demo_results(), "answers": asked_results()}))
    assert demo_report.write(tmp_path) == []
    seen = text_of(tmp_path)
    assert "right before 0 of 3 0% right after 2 of 3 67%" in seen
    assert "0.75 2 1.050 +5.0 %" in seen and "chosen on other questions: 0.75." in seen
    assert f'{EVIL} == <i> "AnAnswer" ✓' in seen and 'wrong ✗ "AnAnswer"' in seen
    assert "1 of 1 wrong answers" in seen and parsed(tmp_path).tags.count("svg") == 3


def test_a_figure_that_became_worse_is_not_blue(run, tmp_path):
    worse = tmp_path / "worse"
    shutil.copytree(run, worse)
    r = results(worse)
    for key in ("learned", "forgotten"):
        r[key] |= {"before": 1.0, "after": 2.0}
    (worse / "results.json").write_text(json.dumps(r))
    report(str(worse))
    page = (worse / told.REPORT).read_text(encoding="utf-8")
    assert re.findall(r'class="tile (\w+)"', page) == ["forgotten", "forgotten"]
    page = (run / told.REPORT).read_text(encoding="utf-8")
    assert r["learned"] != results(run)["learned"] and 'class="tile learned"' in page


def test_the_page_of_a_demo_compares_its_methods(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(demo_results()))
    assert report(str(tmp_path)) == {"report": str(tmp_path / "report.html"), "missing": []}
    seen = text_of(tmp_path)
    assert "full fine-tuning 2.000 → 1.500 −25.0 % 1.000 → 1.100 +10.0 %" in seen
    assert "full fine-tuning 0.5 1.850, 1.050 1 k, 4 kB 1 min 15 s" in seen
    assert "Indistinguishable at one seed: full fine-tuning and LoRA in forgetting." in seen
    assert EVIL in seen and "<i>" in seen and "known test 3 12,345" in seen
    tags = parsed(tmp_path)
    assert tags.open == [] and tags.tags.count("svg") == 2 and "script" not in tags.tags
    assert demo_report.write(tmp_path) == []


def test_layers_are_told_apart_by_kind_and_block():
    assert layer_plots.place("model.layers.3.mlp.gate_proj") == ("gate_proj", 3)
    assert layer_plots.place("model.layers.12.self_attn.q_proj.weight") == ("q_proj.weight", 12)
    assert layer_plots.place("lm_head") == ("lm_head", -1)


def test_numbers_as_people_read_them():
    assert (
        numbers.percent({"before": 2.0, "after": 1.5}) == "−25.0 %"
        and numbers.percent({"before": 1.0, "after": 1.001}) == "+0.1 %"
    )

    assert (
        numbers.plain({"rank": 8, "init": None, "to": ["q", "v"], "on": True})
        == "rank: 8, init: –, to: q, v, on: yes"
    )
    change = {"text": "valid", "before": 2.0, "after": 1.0}
    told_so = RunRecord({"learned": change, "forgotten": {"before": 1.0, "after": 0.99}}, {}, [], Path())
    assert "no measurable forgetting" in run_page.lead(told_so)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("colours", ["0", "1"], ids=["dark", "light"])
def test_a_browser_draws_it_without_a_complaint(run, tmp_path, colours):
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        " disable-component-update disable-sync"
    )
    done = subprocess.run(
        [
            *(
                str(CHROMIUM),
                *(f"--{flag}" for flag in flags.split()),
                f"--user-data-dir={tmp_path / 'user'}",
            ),
            *(
                "--enable-logging=stderr",
                "--v=0",
                "--window-size=500,2000",
                f"--blink-settings=preferredColorScheme={colours}",
            ),
            *(f"--screenshot={tmp_path / 'page.png'}", (run / told.REPORT).as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_every_flag_of_the_verb_has_help():
    from veneer.cli import flags

    assert [f.name for f in flags.of_function(report, ["progress"]) if not f.help.split(" (default")[0]] == []


def overlapping(figure) -> list[str]:
    """Returns pairs of words of a figure that overlap, and words that its edge cuts."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    words = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    unseen = {
        label
        for panel in figure.axes
        for axis in (panel.xaxis, panel.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    boxes = [(t.get_text(), t.get_window_extent()) for t in words if t not in unseen]
    over = [f"{a} | {b}" for i, (a, p) in enumerate(boxes) for b, q in boxes[i + 1 :] if p.overlaps(q)]
    return over + [text for text, box in boxes if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1]


def path_of(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"step": 10 * i, "valid_bpb": y, "known_bpb": x} for i, (x, y) in enumerate(points)]


@pytest.mark.parametrize(
    "points",
    [
        ((1.0, 2.0), (1.05, 1.5), (1.1, 1.2)),
        ((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)),
        ((1.0, 2.0), (1.001, 1.999), (1.5, 1.0), (1.002, 1.998)),
    ],
    ids=["apart", "one place", "end beside the base"],
)
def test_words_in_pictures_do_not_overlap(points):
    dial = [
        {"strength": s, "target_bpb": 1 - 0.1 * s, "known_bpb": 1 + s} for s in (0, 0.25, 0.5, 0.75, 1, 1.25)
    ]
    rows = [{**r, "method": m} for m in ("full", "lora", "loraplus") for r in demo_results()["methods"][:1]]
    asked = [{"strength": s, "right": int(150 * s), "known_bpb": 1 + s} for s in (0, 0.25, 0.5, 0.75, 1)]
    lines = [{"step": i, "loss": 3 - 0.1 * i} for i in range(9)]
    ends = {"before": {"test": 2.0}, "after": {"test": 1.0}, "best_step": 20}
    right = tasks.get("answers").METRIC
    shares = [{"strength": s, "target_right": s} for s in (0, 0.25, 0.5, 0.75, 1, 1.25)]
    with figures.style():
        made = [
            plots.training_path(path_of(*points), BITS),
            plots.evaluations(path_of(*points), ends, BITS),
            plots.dial(dial, 1.0, BITS),
            plots.dial(shares, 1.0, right),
            plots.one_target(rows, 0.03, BITS),
            plots.answers(asked, 200, BITS),
            plots.training_loss(lines),
        ]
        assert [overlapping(figure) for figure in made] == [[]] * len(made)
    assert len(made[3].axes[0].lines[1].get_xdata()) == 6  # a base of 0 has no change in percent


@pytest.mark.skipif(laid_out.CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_column_is_cut_off(run, tmp_path, width):
    """A phone, and a small screen: every table in its room, no word of a picture over another."""
    (tmp_path / "results.json").write_text(json.dumps({**demo_results(), "answers": asked_results()}))
    demo_report.write(tmp_path)
    for folder in (run, tmp_path):
        found = laid_out.laid_out(folder / told.REPORT, width, tmp_path)
        assert found == {"cut": [], "over": []}, folder
