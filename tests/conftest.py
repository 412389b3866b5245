"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nih_test_data() -> Path:
    """The folder with real NIH files: `nih_sample/`, `nih64/`, `nih_meta/`."""
    folder = os.environ.get("NIH_TEST_DATA", "")
    if not folder:
        pytest.skip("NIH_TEST_DATA is not set: no real NIH files to test on")
    return Path(folder).resolve()
