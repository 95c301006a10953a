"""`fit --stream`: rows are read as they are learned, no more of them are alive than a buffer holds, and a"
" resumed run is bit-equal."""

from __future__ import annotations

import itertools
import json
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.objectives import causal_lm
from support.resuming import assert_same
from support.tiny import jsonl

from veneer.data import hub, row_files_streamed
from veneer.data.forms.shape import Shape
from veneer.data.order.streamed import PiecesFrom, Place, Stream
from veneer.data.pack import OPEN, Packer, Segment, pack
from veneer.data.row_files import Row, read_file
from veneer.errors import ConfigError, DataError
from veneer.runs import report
from veneer.runs.fit import fit
from veneer.runs.texts import sources, streamed, texts
from veneer.tasks.causal_lm import CausalLM
from veneer.train.loop.progress import Notes
from veneer.train.run import Run

ROWS = [{"text": tiny.text(100 + i, 5 + 7 * i % 60)} for i in range(60)]


def segment(i: int, n: int = 3) -> Segment:
    return Segment(torch.full((n,), i), torch.full((n,), i), torch.ones(n, dtype=torch.int64))


def ids(micro: list[list[Any]]) -> list[list[int]]:
    return [[int(w[0].inputs[0]) for w in windows] for windows in micro]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stream")
    jsonl(root / "rows.jsonl", *ROWS)
    jsonl(
        root / "more.jsonl",
        *({"prompt": tiny.text(i, 5), "completion": tiny.text(200 + i, 4)} for i in range(12)),
    )
    return root


def settings(place: Path, **changed: Any) -> dict[str, Any]:
    return tiny.settings(place, **{"data": str(place / "rows.jsonl"), "stream": True, "buffer": 7, **changed})


def task_of(run: Run) -> CausalLM:
    return causal_lm(tiny.tokenizer(), **tiny.reading(run))


# -- order
# ------------------------------------------------------------------------------------------------------------


def endless(length: int = 3) -> PiecesFrom:
    """Rows without an end, of one, two or three segments, which are numbered through."""

    def read(place: Place) -> Iterator[tuple[Place, Segment]]:
        for row in itertools.count(place.row):
            for i in range(place.pieces if row == place.row else 0, row % 3 + 1):
                yield Place(row, i + 1), segment(3 * row + i, length + row % 4)

    return read


def stream(seed: int = 0, *, length: int | None = None, buffer: int = 10) -> Stream:
    kind = causal_lm(length=length or 256, packing=length is not None)
    return Stream(endless(), kind, 3, 2, buffer=buffer, seed=seed)


def test_windows_are_mixed_over_the_buffer_and_none_is_lost():
    source = [int(s.inputs[0]) for _, s in itertools.islice(endless()(Place()), 400)]
    made = stream(buffer=16)
    order = [i for n in range(40) for windows in ids(made.step(n)) for i in windows]
    assert (
        len(set(order)) == 240
        and set(source[:150]) <= set(order) <= set(source[:257])
        and order != sorted(order)
    )
    assert all(
        source.index(i) < place + 16 for place, i in enumerate(order)
    )  # nothing can come before it has been read
    again, other = stream(buffer=16), stream(1, buffer=16)
    assert [ids(again.step(n)) for n in range(3)] == [
        [order[6 * n : 6 * n + 3], order[6 * n + 3 : 6 * n + 6]] for n in range(3)
    ]
    assert ids(other.step(0)) != [order[:3], order[3:6]]


@pytest.mark.parametrize("length", [None, 14])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_saved_state_goes_on_with_the_same_bits(tmp_path, length, stop):
    def tensors(micro: list[list[Any]]) -> list[list[list[list[list[int]]]]]:
        return [[[[t.tolist() for t in s] for s in w] for w in windows] for windows in micro]

    whole, first = stream(length=length), stream(length=length)
    steps = [tensors(whole.step(n)) for n in range(30)]
    for n in range(stop):
        first.step(n)
    save_file(first.state(), tmp_path / "state.safetensors")
    second = stream(length=length)
    second.restore({"p.other": torch.zeros(1), **load_file(tmp_path / "state.safetensors")})
    assert [tensors(second.step(n)) for n in range(stop, 30)] == steps[stop:]
    assert {t.dtype for w in second.held for s in w for t in s} == {torch.int64}
    with pytest.raises(ValueError, match="a stream's steps must be in order: the next one is 30, got 3"):
        second.step(3)


def test_a_window_is_closed_as_soon_as_nothing_can_be_added_to_it():
    packer = Packer(10)
    closed = [packer.add(segment(i, 6)) for i in range(OPEN + 1)]
    assert closed[:-1] == [None] * OPEN and closed[-1] is not None and int(closed[-1][0].inputs[0]) == 0
    sizes = [5, 5, 7, 2, 1, 10, 3, 9, 1]
    made = [[len(s.inputs) for s in w] for w in pack([segment(i, n) for i, n in enumerate(sizes)], 10)]
    assert made == [[5, 5], [7, 2, 1], [10], [3, 1], [9]]


# -- memory
# -----------------------------------------------------------------------------------------------------------


def test_no_more_is_alive_than_the_buffer_holds(place, monkeypatch):
    """Rows without an end, counted while steps are made: what is alive does not grow with what is read."""
    rows: list[weakref.ref[Row]] = []
    tensors: list[weakref.ref[torch.Tensor]] = []

    def unending(name: str, split: str, shape: Shape) -> Iterator[Row]:
        for i in itertools.count():
            row = Row("text", {"text": tiny.text(i, 40)}, f"row {i}")
            rows.append(weakref.ref(row))
            yield row

    def counted(*given: Any) -> list[Segment]:
        found = real(*given)
        tensors.extend(weakref.ref(s.inputs) for s in found)
        return found

    real = streamed._pieces
    monkeypatch.setattr(sources, "stream", unending)
    monkeypatch.setattr(streamed, "_pieces", counted)
    run = Run.from_dict(settings(place, buffer=20, data="endless"))
    made = streamed.order(run, task_of(run), Notes())
    alive = []
    for n in range(100):
        made.step(n)
        alive.append((sum(r() is not None for r in rows), sum(t() is not None for t in tensors)))
    held = 21 + OPEN + run.batch * run.accumulate  # windows, of one long piece of a row or two short ones
    assert len(rows) > 240 and max(n for n, _ in alive) <= 2
    assert OPEN < max(n for _, n in alive) <= 2 * held < len(tensors) / 2
    assert max(n for _, n in alive[60:]) <= max(n for _, n in alive[:30]) + 8


def test_a_piece_of_a_long_text_does_not_keep_the_whole(place):
    run = Run.from_dict(settings(place))
    found = streamed._pieces(Row("text", {"text": tiny.text(1, 3000)}, "long"), task_of(run), Notes())
    assert len(found) > 100 and all(
        t.untyped_storage().nbytes() == t.numel() * t.element_size() for s in found for t in s
    )


# -- trainings
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A streamed training of two sources that nothing interrupted, and which reads them more than once."""
    both = [str(place / "rows.jsonl"), str(place / "more.jsonl")]
    given = settings(place, data=both, out=str(place / "whole"))
    fit(Run.from_dict(given), progress=False)
    return place / "whole"


@pytest.mark.parametrize("step", [1, 8])
def test_killed_and_resumed_it_is_bit_equal(place, whole, tmp_path, step):
    given = settings(
        place, data=[str(place / "rows.jsonl"), str(place / "more.jsonl")], out=str(tmp_path / "run")
    )
    assert tiny.train(given, signal_at=(step, signal.SIGKILL)) == -signal.SIGKILL
    assert tiny.train({**given, "resume": True}) == 0
    assert_same(given, whole)


def test_what_is_learned_is_what_a_run_in_memory_learns(place):
    """One reading of the stream has the pieces of the same rows read as a whole, no more and no fewer."""
    run = Run.from_dict(settings(place))
    held = texts.prepare(read_file(place / "rows.jsonl"), task_of(run), Notes()).examples
    wanted = sorted(s.inputs.tolist() for w in held for s in w)
    source = streamed.order(run, task_of(run), Notes()).pieces_from(Place())
    first = itertools.islice(source, len(wanted))
    assert sorted(s.inputs.tolist() for _, s in first) == wanted
    assert next(source)[0].row == 0  # and begins again


def test_reading_goes_on_from_any_place(place, tmp_path):
    """Rows of one piece and of several, and a row that is left out: from every place on, what follows is"
    " what followed there."""
    data = jsonl(tmp_path / "rows.jsonl", *({"text": tiny.text(i, 5 + 50 * (i % 3))} for i in range(6)))
    run = Run.from_dict(settings(place, data=str(data)))
    left_out = streamed._keys([read_file(data)[3]])

    def read(where: Place, n: int) -> list[tuple[Place, list[int]]]:
        found = streamed._reading(run, task_of(run), left_out, where, Notes())
        return [(after, s.inputs.tolist()) for after, s in itertools.islice(found, n)]

    whole = read(Place(), 40)
    assert {after.row for after, _ in whole} == {0, 1, 2, 4, 5} and max(
        after.pieces for after, _ in whole
    ) > 3
    for i, (after, _) in enumerate(whole[:20]):
        assert read(after, 15) == whole[i + 1 : i + 16]


def test_rows_set_aside_for_validation_are_not_learned(place, tmp_path):
    data = jsonl(tmp_path / "rows.jsonl", *ROWS, *ROWS[:4])  # the first ones come again at the end
    given = settings(place, data=str(data), valid=[], steps=2, out=str(tmp_path / "run"))
    result = fit(Run.from_dict(given), progress=False)
    aside = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["valid"]["rows"]
    measured = texts.prepare(read_file(data)[:aside], task_of(Run.from_dict(given)), Notes()).examples
    assert 4 <= aside <= 20 and len(measured) >= 4
    assert result.metrics["notes"][-4].startswith(
        f"no valid text is given: the first {aside} rows of the stream are set aside to choose the best"
        f" step by, and rows equal to them"
        f" are not learned; give valid if the data is sorted"
    )
    run = Run.from_dict({**given, "known": "none"})
    left_out = streamed._keys(streamed._set_aside(run, task_of(run)))
    left = [row.where for row in streamed._all(run) if streamed._is_learned(row, left_out)]
    assert len(left) == len(ROWS) + 4 - aside - min(aside, 4) and left[0].endswith(f"line {aside + 1}")


def test_a_run_says_what_it_reads_and_its_report_can_be_made_again(place, whole, tmp_path):
    results = json.loads((whole / "results.json").read_text())
    says = "data is read during training: the next window is drawn from 7; rows are checked as they come"
    assert says in results["notes"]
    assert any(n.startswith("the beginning of train: ") for n in results["notes"])
    assert "all 72 rows of the stream have been read; it begins again" in results["notes"]
    out = tmp_path / "told"
    fit(Run.from_dict(settings(place, steps=2, out=str(out))), progress=False)
    assert report.report(str(out), measure=True, progress=False)["missing"] == []
    assert "train (its beginning)" in (out / "report.html").read_text(encoding="utf-8")
    assert "train (the beginning of a stream)" in (out / "adapter" / "README.md").read_text(encoding="utf-8")


def test_a_bad_row_ends_the_training_when_it_comes_and_a_mended_one_goes_on(place, tmp_path):
    good = [json.dumps({"text": tiny.text(i, 40)}) for i in range(55)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([*good, '{"txet": "x"}']), encoding="utf-8")
    given = settings(place, data=str(data), save_every=1, steps=14, out=str(tmp_path / "run"))
    with pytest.raises(DataError) as e:
        fit(Run.from_dict(given), progress=False)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    why, then = str(e.value).splitlines()
    assert why.startswith(f"{data} line 56: column 'text' is missing")
    assert then == (
        f"the training ended after step {int(kept[-1].name[5:])} of 14; correct the data and resume from"
        f" {kept[-1].name} with resume=True allow='data'"
    )
    data.write_text("\n".join([*good, '{"text": "x"}']), encoding="utf-8")
    result = fit(Run.from_dict({**given, "resume": True, "allow": ["data"]}), progress=False)
    assert len(kept) > 1 and result.metrics["steps"] == 14


# -- sources
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", "rows.jsonl rows.csv rows.tsv rows.parquet rows.arrow stream.arrow rows.feather a.txt".split()
)
def test_a_row_at_a_time_is_the_same_rows(tmp_path, name):
    import pyarrow
    from pyarrow import csv, feather, ipc, parquet

    table = pyarrow.table(
        {"prompt": [f'q{i}, \u00e9\n"x"' for i in range(2500)], "completion": [str(i) for i in range(2500)]}
    )
    path, suffix = tmp_path / name, name.split(".")[1]
    if suffix in ("csv", "tsv"):
        csv.write_csv(table, path, csv.WriteOptions(delimiter="," if suffix == "csv" else "\t"))
    elif suffix == "arrow":
        with (ipc.new_file if name.startswith("rows") else ipc.new_stream)(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        {"parquet": parquet.write_table, "feather": feather.write_feather}.get(
            suffix, lambda t, p: jsonl(p, *t.to_pylist())
        )(table, path)
    if suffix == "txt":
        path.write_text("one text\nof two lines", encoding="utf-8")
    found = list(row_files_streamed.stream_file(path))
    assert found == read_file(path) and len(found) == (1 if suffix == "txt" else 2500)


def test_datasets_and_built_in_texts_stream_too(tmp_path, monkeypatch):
    import datasets

    held = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": held, "dev": held.select(range(3))}).save_to_disk(tmp_path / "saved")
    assert list(sources.stream(str(tmp_path / "saved"), "train")) == sources.rows(
        [str(tmp_path / "saved")], "train"
    )
    assert list(sources.stream(f"{tmp_path}/saved:dev", "train")) == sources.rows(
        [f"{tmp_path}/saved:dev"], "train"
    )

    def load_dataset(path, config, split, streaming=False):
        assert (path, config, split) == ("someone/notes", None, None)
        return {"train": held.to_iterable_dataset() if streaming else held}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(sources.stream("someone/notes", "train"))
    assert found == sources.rows(["someone/notes"], "train") and found[4].where == "someone/notes:train row 5"
    assert list(sources.stream("builtin:prose", "valid")) == sources.rows(["builtin:prose"], "valid")
    assert hub.open_on_hub("someone/notes", "train")[1] is held


def test_sources_take_turns_until_each_has_ended(place):
    run = Run.from_dict(settings(place, data=[str(place / "rows.jsonl"), str(place / "more.jsonl")]))
    names = [Path(row.where.split(" line")[0]).name for row in streamed._all(run)]
    assert names[:24] == ["rows.jsonl", "more.jsonl"] * 12 and names[24:] == ["rows.jsonl"] * 48


# -- refusals
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.json",
            b'[{"text": "x"}]',
            "a.json: a JSON list cannot be streamed; write it as .jsonl, with one object a line",
        ),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "x"}\n\xff\n', "a.jsonl: not UTF-8 (byte 0xff after line "),
        ("a.jsonl", b'{"text": "x"}\n[]\n', "a.jsonl line 2: must be a JSON object with columns, got a list"),
        ("a.csv", b"text\n", "a.csv: the table has column names but no rows"),
        ("a.parquet", b"not one", "a.parquet: unreadable as parquet ("),
        ("a.xlsx", b"", "a.xlsx: unsupported format .xlsx;"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        list(row_files_streamed.stream_file(tmp_path / name))
    assert str(e.value).startswith(f"{tmp_path}/{says}")


def test_settings_that_make_no_sense_with_a_stream(place, tmp_path):
    with pytest.raises(ConfigError, match=r"^stream needs steps: .* unknown until its end$"):
        Run(data=("a.txt",), stream=True)
    with pytest.raises(
        ConfigError, match=r"^buffer 9 applies to a stream only; set stream=True, or leave buffer out$"
    ):
        Run(data=("a.txt",), buffer=9)
    with pytest.raises(ConfigError, match=r"^buffer must be 1 or more, got 0$"):
        Run(data=("a.txt",), buffer=0, stream=True, steps=1)
    with pytest.raises(
        DataError,
        match=r"rows.jsonl@2: a stream takes its sources in turn, without weights; remove @ and the number",
    ):
        fit(
            Run.from_dict(settings(place, data=f"{place}/rows.jsonl@2", out=str(tmp_path / "run"))),
            progress=False,
        )
    one = jsonl(tmp_path / "one.jsonl", ROWS[0])
    with pytest.raises(
        DataError,
        match=r"one.jsonl: the rows set aside as valid text leave nothing to learn; give valid or more data",
    ):
        fit(
            Run.from_dict(settings(place, data=str(one), valid=[], out=str(tmp_path / "run"))), progress=False
        )
    assert not (tmp_path / "run").exists()
