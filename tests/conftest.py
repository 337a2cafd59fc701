"""Every test keeps diagd's machine cache in a directory of its own run."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def machine_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep packed weights and checks of the tests out of the user's cache."""
    os.environ["DIAGD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
