"""Two trainings that are started into one folder: one of them trains, the other is refused."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from support import tally, tiny
from support.resuming import assert_same

from veneer.errors import ConfigError, VeneerError
from veneer.runs import fit as fitting
from veneer.train.errors import Busy
from veneer.train.run import Run

SHORT = {"steps": 4, "eval_every": 2, "save_every": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("races")


@pytest.fixture(scope="module")
def whole(place) -> Path:
    fitting.fit(Run.from_dict(tiny.settings(place, **SHORT, out=str(place / "whole"))), progress=False)
    return place / "whole"


class Meeting:
    """Lets a second training run at a chosen moment of the first one."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, second: Any) -> None:
        self.real, self.second, self.met = getattr(fitting, name), second, False
        patch.setattr(fitting, name, self)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not self.met:
            self.met = True
            self.second()
        return self.real(*given, **named)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("moment", ["prepare", "_write_settings", "loop_of"])
def test_of_two_trainings_in_a_new_folder_one_trains(place, whole, tmp_path, monkeypatch, moment, resume):
    """The second starts and, if it may, ends while the first is at that moment of its beginning."""
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"), resume=resume)
    outcomes: list[Any] = []

    def train() -> None:
        try:
            outcomes.append(fitting.fit(Run.from_dict(given), progress=False).metrics["steps"])
        except VeneerError as e:
            outcomes.append(type(e))

    Meeting(monkeypatch, moment, train)
    with tally.one("races"):
        train()
        second_first = moment == "prepare"  # before the first has written anything
        begun = second_first or moment == "loop_of"  # config.json is there, and says so without resume
        refused = ConfigError if begun and not resume else 4 if second_first else Busy
        assert outcomes == ([4, refused] if second_first else [refused, 4])
        assert_same(given, whole)


@pytest.mark.parametrize("at_once", range(12 if tally.FULL else 2))
def test_of_trainings_started_at_once_one_trains(place, whole, tmp_path, at_once):
    """Processes of their own, as two users would start them."""
    given = tiny.settings(place, **SHORT, out=str(tmp_path / "run"))
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(tiny.train(given))) for _ in range(2)]
    with tally.one("races"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) in ([0, Busy.exit_code], [0, ConfigError.exit_code])
        assert_same(given, whole)
        shutil.rmtree(given["out"])
