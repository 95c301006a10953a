"""A place that cannot be written is refused before anything is done."""

from __future__ import annotations

import os

import pytest

from veneer.errors import ConfigError
from veneer.files import check_new, unusable


def test_a_new_path_must_not_exist_and_must_be_possible(tmp_path):
    check_new(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^out .*file exists; choose another or remove it$"):
        check_new(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"^out .*b: .*file is a file; choose another folder$"):
        check_new(tmp_path / "file" / "a" / "b")
    assert unusable(tmp_path, new=False) is None


def test_a_place_without_permission_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may do all
    with pytest.raises(ConfigError, match=rf"^to .*b: {tmp_path} is not writable for this user; choose"):
        check_new(tmp_path / "a" / "b", "to")
