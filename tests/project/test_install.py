"""The install script never lets pip choose a CUDA build where there is no GPU."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_every_choice_asks_for_a_cpu_build(script):
    choices = script.choices("2.13.0", "", True)
    assert [c[-1] for c in choices] == ["torch==2.13.0+cpu"] * 2
    # the configured places come first
    assert script.CPU_INDEX not in choices[0] and script.CPU_INDEX in choices[1]


def test_with_a_gpu_or_elsewhere_the_plain_version_is_taken(script):
    assert script.choices("2.13.0", "", False) == [["torch==2.13.0"]]


def test_the_users_own_choice_goes_before_all(script):
    for cpu_only in (True, False):
        assert script.choices("2.13.0", "torch==2.13.0+rocm7", cpu_only) == [["torch==2.13.0+rocm7"]]


@pytest.mark.parametrize(
    ("platform", "code", "cpu_only"), [("linux", 0, False), ("linux", 9, True), ("darwin", 9, False)]
)
def test_a_gpu_is_what_nvidia_smi_lists(script, monkeypatch, platform, code, cpu_only):
    class Done:
        returncode = code

    monkeypatch.setattr(script.sys, "platform", platform)
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **k: Done)
    assert script.is_cpu_only() == cpu_only


def test_no_nvidia_smi_is_no_gpu(script, monkeypatch):
    def missing(*a, **k):
        raise FileNotFoundError

    monkeypatch.setattr(script.sys, "platform", "linux")
    monkeypatch.setattr(script.subprocess, "run", missing)
    assert script.is_cpu_only()


def test_no_build_at_all_stops_with_advice(script, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH", raising=False)
    monkeypatch.setattr(script, "is_cpu_only", lambda: True)
    monkeypatch.setattr(script, "run", lambda *a: None)
    monkeypatch.setattr(script, "install", lambda *a: False)
    with pytest.raises(
        SystemExit, match=r"no CPU build of torch [\d.]+ for this Python, .* make TORCH=torch=="
    ):
        script.main(tmp_path)


def test_constraints_are_exact_and_name_no_place():
    lines = [
        x
        for x in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not x.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.11\")?", x) for x in lines)
    assert any(x.startswith("torch==") for x in lines)


def test_ci_calls_the_readmes_test_command():
    block = re.search(
        r"^## Test\n+```\n(.*?)\n```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert block and block.group(1) == "make test"
    assert "test_command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_demo_installs_its_own_extras_alone(script):
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"tools/install.py .venv {script.DEMO}\n" in make
    assert "demo: $(if $(wildcard $(STAMP)),$(STAMP),$(LEAN))" in make
    assert set(script.DEMO.split(",")) == {"text", "cli", "plots"}


def test_installers_are_quiet_unless_they_fail(script, tmp_path, capfd):
    python = script.sys.executable
    script.run([python, "-c", "print('a line of pip')"], "advice")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="advice"):
        script.run([python, "-c", "print('why'); raise SystemExit(1)"], "advice")
    assert "why" in capfd.readouterr().err


def test_the_size_of_an_installation_counts_files_once(script, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert script.megabytes(tmp_path) == 3


def test_every_target_of_the_makefile_is_one_that_make_can_read():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    run = subprocess.run(
        ["make", "-n", *phony.group(1).split()], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "a rule replaces another one"
