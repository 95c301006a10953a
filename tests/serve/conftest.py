"""Fixtures of the server's tests: one folder of adapters, one oracle, one server for the tests that leave it
alone.
"""

from __future__ import annotations

import pytest
from support import served, tiny

import veneer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A root with all adapters."""
    return served.folder(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def oracle(folders):
    return served.Oracle({name: folders / name for name in served.ADAPTERS})


@pytest.fixture(scope="module")
def server(folders):
    with veneer.serve(served.model(), folders, tokenizer=tiny.tokenizer(), watch=0, slots=3) as made:
        yield made
