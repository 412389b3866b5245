"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nih_test_data() -> Path:
    """The folder with real NIH files: `nih_sample/`, `nih64/`, `nih_meta/`."""
    folder = os.environ.get("NIH_TEST_DATA", "")
    if not folder:
        pytest.skip("NIH_TEST_DATA is not set: no real NIH files to test on")
    return Path(folder).resolve()


@pytest.fixture
def interruptible():
    """Answer SIGINT as in a terminal: a job that a shell runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# By what they take, so that two workers end together; a file goes to one of them as a whole.
LONGEST = ("notebooks", "batch", "training", "privacy", "bench", "evidence")


def pytest_collection_modifyitems(items):
    """Begin with the longest folders."""
    ranks = {folder: rank for rank, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(ranks)))
