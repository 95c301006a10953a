"""On a full disk every command that writes says where, how much and what to do, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tally, tiny
from support.fresh import SOURCE
from support.room import room_for

import veneer
from veneer import disk
from veneer.adapt import attached
from veneer.cli.frame import main
from veneer.errors import ConfigError, NotWritten
from veneer.files import left_over, making, replacing
from veneer.models import pretrained

SHORT = {"steps": 2, "eval_every": 2, "save_every": 1, "batch": 1, "accumulate": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A base, texts, an adapter, a finished run and files of other programs."""
    root = tmp_path_factory.mktemp("disk")
    given = tiny.settings(root, **SHORT, out=str(root / "run"))
    assert main(fit(given)) == 0
    (root / "other.yml").write_text("base_model: x\nadapter: lora\nlora_r: 8\ndatasets:\n  - path: a.jsonl\n")
    tiny.jsonl(
        root / "asked.jsonl",
        *({"custom_id": str(i), "body": {"prompt": "the", "max_tokens": 2}} for i in range(3)),
    )
    model = pretrained.causal_lm(str(root / "base"), torch.float32, torch.device("cpu"))
    veneer.attach(model, "lora", rank=4)
    with torch.no_grad():
        for _, delta in attached.changes(model, "default"):
            delta.B.normal_()
    veneer.merge(model)
    model.save_pretrained(root / "tuned")
    tiny.tokenizer().save_pretrained(root / "tuned")
    return root


def fit(given: dict[str, Any]) -> list[str]:
    flags = {k: v for k, v in given.items() if k not in ("options", "report")}
    words = [word for k, v in flags.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return ["fit", *words, "--rank", "4", "--no-report"]


def commands(place: Path) -> dict[str, Callable[[Path], list[str]]]:
    run, base = str(place / "run"), str(place / "base")
    return {
        "fit": lambda out: fit(tiny.settings(place, **SHORT, out=str(out))),
        "merge": lambda out: ["merge", run, "--out", str(out), "--dtype", "fp32"],
        "export": lambda out: ["export", base, "--adapter", run, "--out", str(out), "--dtype", "fp32"],
        "combine": lambda out: ["combine", f"{run}@0.5", "--out", str(out), "--rank", "2"],
        "extract": lambda out: [
            "extract",
            str(place / "tuned"),
            "--base",
            base,
            "--out",
            str(out),
            "--rank",
            "4",
        ],
        "convert": lambda out: ["convert", run, "--to", "kohya", "--out", str(out)],
        "convert to a pickle": lambda out: [
            "convert",
            run,
            "--to",
            "litgpt",
            "--model",
            base,
            "--out",
            str(out),
        ],
        "convert-config": lambda out: ["convert-config", str(place / "other.yml"), "--out", f"{out}.yaml"],
        "compress": lambda out: ["compress", base, "--keep", "0.7", "--method", "svd", "--out", str(out)],
    }


def there(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("n_bytes", tally.few([3000, 0]))
@pytest.mark.parametrize("name", commands(Path()))
def test_every_command_answers_and_can_be_repeated(place, tmp_path, capsys, name, n_bytes):
    command = commands(place)[name](tmp_path / "made")
    capsys.readouterr()
    with tally.one("disk_full_cases"):
        with room_for(n_bytes):
            code = main(command)
        said = capsys.readouterr().err
        if name == "convert-config" and n_bytes:
            assert code == 0
            return
        assert code == 1, said
        assert str(tmp_path / "made") in said and re.search(r"[\d,]+ bytes", said), said
        assert "Traceback" not in said and "unexpected" not in said
        assert left_over(tmp_path) == []
        if name == "fit":
            assert set(there(tmp_path / "made")) <= {"lock", "config.json", "metrics.jsonl", "checkpoints"}
            command = [*command, "--resume"]
        elif name != "compress":  # its finished blocks stay, to go on from
            assert there(tmp_path) == []
        assert main(command) == 0, capsys.readouterr().err


def test_a_report_that_cannot_be_written_leaves_the_old_one(place, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(place / "run", out)
    assert main(["report", str(out)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with tally.one("disk_full_cases"), room_for(100):
        assert main(["report", str(out)]) == 1
    assert re.search(
        rf"{out}.* could not be written: File too large after \d+ bytes", capsys.readouterr().err
    )
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_answers_of_a_file_go_on_where_the_disk_was_full(place, capsys):
    pytest.importorskip("pydantic")
    base, asked, out = str(place / "base"), str(place / "asked.jsonl"), place / "answers.jsonl"
    command = ["serve", base, "--batch", asked, "--out", str(out)]
    with tally.one("disk_full_cases"):
        with room_for(600):  # an answer and a part of the next
            assert main(command) == 1
        assert re.search(rf"{out} could not be written: .* after 600 bytes", capsys.readouterr().err)
        assert main(command) == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["custom_id"] for line in lines] == ["0", "1", "2"]


# -- memory maps


def test_a_cache_in_a_memory_map_has_its_room_first(place, tmp_path):
    """On a full disk writing into the map of a sparse file would end the process by SIGBUS."""
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"), to="model.layers.1.mlp.down_proj")
    flags = [*fit({k: v for k, v in given.items() if k != "to"}), "--to", given["to"], "--cache-frozen"]
    with tally.one("disk_full_cases"):
        with room_for(50_000):
            assert main(flags) == 1
        assert main([*flags, "--resume"]) == 0


@pytest.mark.parametrize("allocates", [True, False])
def test_reserved_room_is_really_there(tmp_path, monkeypatch, allocates):
    path = tmp_path / "file"
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    path.write_bytes(b"kept")
    disk.reserve(path, 300_000)
    assert path.stat().st_size == 300_000 and path.stat().st_blocks * 512 >= 300_000
    assert path.read_bytes()[:5] == b"kept\0"
    with room_for(100_000), pytest.raises(NotWritten, match=rf"{tmp_path}/more could not be written: "):
        disk.reserve(tmp_path / "more", 300_000)


# -- errors of libraries


def test_errors_of_every_library_are_known(tmp_path):
    from safetensors.torch import save_file

    def by_torch(path: Path) -> None:
        torch.save({"x": torch.zeros(5000)}, path)

    writers = [
        lambda p: save_file({"x": torch.zeros(5000)}, p),
        lambda p: p.write_bytes(bytes(20_000)),
        lambda p: tiny.tokenizer().backend_tokenizer.save(str(p)),
        by_torch,
    ]
    for write in writers:
        with room_for(1000), pytest.raises(Exception) as e:
            write(tmp_path / "file")
        assert disk.fault(e.value) in (os.strerror(errno.EFBIG), "the disk takes no more"), e.value
        with (
            room_for(1000),
            pytest.raises(NotWritten, match=r"could not be written: .* after [0-9,]+ bytes; "),
        ):
            with replacing(tmp_path / "file") as (temporary,):
                write(temporary)
        assert left_over(tmp_path) == []
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        assert disk.fault(OSError(number, "x")) == os.strerror(number)
    for other in (OSError(errno.ENOENT, "x"), ValueError("x"), RuntimeError("mat1 and mat2")):
        assert disk.fault(other) is None


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(ConfigError, match="was made by another process meanwhile"),
        making(tmp_path / "a") as made,
    ):
        (made / "own").write_text("")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("")
    assert there(tmp_path) == ["a"] and there(tmp_path / "a") == ["theirs"]


@pytest.mark.skipif(not tally.FULL, reason="imports everything anew: make test-faults")
def test_a_small_real_disk_that_is_full(place, tmp_path):
    """Where this user may mount one: the writes of the system itself, without a limit that Python sets."""
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    script = (
        f"mount -t tmpfs -o size=64k none {tmp_path} && "
        f"{sys.executable} -m veneer merge {place / 'run'} --out {tmp_path / 'made'}; "
        f"echo code $?; ls -A {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )
    with tally.one("disk_full_cases"):
        assert done.stdout == "code 1\n", done.stderr
        assert f"{tmp_path / 'made'} could not be written: No space left on device" in done.stderr
