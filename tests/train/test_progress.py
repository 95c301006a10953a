"""Long phases report themselves where there is no terminal."""

from __future__ import annotations

import re
import threading
import time

import pytest

from veneer.train.loop import progress
from veneer.train.loop.progress import Voice


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)


def wait_for(capsys, pattern, lines=1):
    """Lines on stderr once so many match the pattern."""
    seen = ""
    for _ in range(500):
        seen += capsys.readouterr().err
        found = re.findall(rf"^{pattern}$", seen, re.MULTILINE)
        if len(found) >= lines:
            return found
        time.sleep(0.01)
    pytest.fail(f"{lines} lines {pattern!r} were expected, got {seen!r}")


def test_a_phase_says_every_few_seconds_that_it_goes_on(capsys):
    voice = Voice(True)
    with voice.phase("compiling the model"):
        wait_for(capsys, r"compiling the model \(\d+ s\)", 2)
        with voice.phase("warming up"):
            wait_for(capsys, r"warming up \(\d+ s\)")
        wait_for(capsys, r"compiling the model \(\d+ s\)")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == "" and voice.said == []
    assert "progress" not in {t.name for t in threading.enumerate()}


def test_steps_without_a_terminal_are_lines(capsys):
    voice = Voice(True)
    with voice.bar(100, 0):
        wait_for(capsys, r"training \(\d+ s\)")
        voice.show(7, "loss 2.5")
        wait_for(capsys, r"step 7 of 100: loss 2.5 \(\d+ s\)")
        voice.show(7, "valid text", "measuring")
        wait_for(capsys, r"measuring valid text \(\d+ s\)")


def test_a_silent_voice_and_a_short_phase_say_nothing(capsys, monkeypatch):
    with Voice(False).phase("compiling"):
        time.sleep(0.1)
    monkeypatch.setattr(progress, "INTERVAL", 10.0)
    with Voice(True).phase("compiling"):
        pass
    assert capsys.readouterr().err == ""


def test_a_phase_that_fails_ends_its_lines(capsys):
    voice = Voice(True)
    with pytest.raises(ValueError), voice.phase("reading texts"):
        raise ValueError
    assert "progress" not in {t.name for t in threading.enumerate()}
    with voice.phase("loading"):
        wait_for(capsys, r"loading \(\d+ s\)")
