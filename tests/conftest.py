"""Shared settings of the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Fixtures that several files use.
pytest_plugins = ["support.pretraining", "support.real"]
